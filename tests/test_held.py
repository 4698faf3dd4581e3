"""What was checked is what is loaded: a package exchanged at any moment is read whole, or not."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu_kernels import needs_avx2, needs_compiler
from safetensors.torch import load_file, save_file
from tiny import Compiled, resealed

from moac.store.rename import exchange
from moac_runtime.errors import ArtifactError
from moac_runtime.package.artifact import WEIGHT_INDEX, open_artifact, start_opening
from moac_runtime.package.held import HeldFiles
from moac_runtime.package.trust import trust
from moac_runtime.package.weights import load_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Loads a package again and again while another one takes its place, at one moment after another:
# whenever Python opens, maps, lists or links anything. Prints the digest loaded each time, beside
# the logits; what is not a whole package prints as an error.
AT_EVERY_MOMENT = """
import json, os, shutil, sys
from pathlib import Path
from moac.store.rename import exchange
from moac_runtime import load
from moac_runtime.backends.session import Feed

first, second, place, backend = sys.argv[1:]
place = Path(place)
aside = place.with_name("aside")
MOMENTS = ("open", "mmap.__new__", "ctypes.dlopen", "os.listdir", "os.scandir")
left = None  # moments until the exchange; None counts none

def watch(event, arguments):
    global left
    if left is None or event not in MOMENTS:
        return
    left -= 1
    if left == -1:
        now, left = left, None
        exchange(aside, place)
        shutil.rmtree(aside)  # as compile --force does with the package it replaced
        left = now

def answered():
    model = load(place, backend=backend, threads=1)
    session = model._open_session(32)
    logits = session.step([Feed(session.admit(32), [3, 1, 4, 1, 5], [4])])
    return model.digest, [round(float(x), 3) for x in logits[0]]

def laid_out():
    for path, source in ((place, first), (aside, second)):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)

laid_out()
answered()  # libraries load here
sys.addaudithook(watch)
found, moment = [], 0
while True:
    laid_out()
    left = moment
    try:
        found.append(answered())
    except Exception as error:
        found.append(("error", repr(error)))
    over, left = left >= 0, None
    if over:
        break
    moment += 1
print(json.dumps(found))
"""


@pytest.fixture
def pair(cpu_package: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two packages of one shape: other weights, and another order of heads."""
    first, second = tmp_path / "first", tmp_path / "second"
    for package in (first, second):
        shutil.copytree(cpu_package, package)
        shutil.rmtree(package / "moac_runtime")  # hashed, and read by nobody
    (shard,) = (second / "weights").glob("*.safetensors")
    tensors = {name: tensor * 1.25 for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    manifest = json.loads((second / "moac.json").read_text())
    order = [list(reversed(layer)) for layer in manifest["head_order"]]
    trust(resealed(first), "a test")
    trust(resealed(second, head_order=order), "a test")
    return first, second


@needs_compiler
@needs_avx2
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_an_exchange_at_any_moment_mixes_nothing(
    backend: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EVERY_MOMENT, *pair, tmp_path / "out", backend],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    digests = [json.loads((package / "moac.json").read_text())["digest"] for package in pair]
    errors = {str(why) for name, why in found if name not in digests}
    assert errors == set()
    told = {
        digest: {str(logits) for name, logits in found if name == digest} for digest in digests
    }
    assert [len(told[digest]) for digest in digests] == [1, 1], "a package answers in one way"
    assert told[digests[0]] != told[digests[1]]
    assert len(found) > 20  # moments tried


# ---- the files that are held


@pytest.fixture
def package(tiny_package: Compiled, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_package.package, tmp_path / "out"))


def damaged(package: Path, copy: Path) -> Path:
    """Something else of the same size under every name that a reader asks for."""
    shutil.copytree(package, copy)
    for path in (*copy.glob("weights/*"), copy / "plan.json", *copy.glob("tokenizer/*")):
        path.write_bytes(b"?" * path.stat().st_size)
    return copy


def exchanged_folder(package: Path) -> None:
    exchange(damaged(package, package.with_name("other")), package)


def exchanged_files(package: Path) -> None:
    other = damaged(package, package.with_name("other"))
    for path in [path for path in other.rglob("*") if path.is_file()]:
        path.replace(package / path.relative_to(other))


def removed(package: Path) -> None:
    shutil.rmtree(package)


@pytest.mark.parametrize("change", [exchanged_folder, exchanged_files, removed])
def test_what_was_checked_is_read_whatever_becomes_of_its_name(
    change: Callable[[Path], None], package: Path
) -> None:
    before = load_weights(open_artifact(package), torch.float32)
    expected = {name: tensor.clone() for name, tensor in before.items()}
    artifact = open_artifact(package)
    contents = {name: artifact.read(name) for name in (WEIGHT_INDEX, "tokenizer/tokenizer.json")}
    change(package)
    for name, content in contents.items():
        assert artifact.read(name) == artifact.path(name).read_bytes() == content
    after = load_weights(artifact, torch.float32)
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("change", [exchanged_files, exchanged_folder])
def test_what_is_exchanged_while_it_is_hashed_is_not_what_is_hashed(
    change: Callable[[Path], None], package: Path
) -> None:
    opening = start_opening(package)
    change(package)
    assert opening.result().plan


def test_a_file_that_is_exchanged_before_it_is_opened_is_found(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is the same, so nobody tries again; the hash is of what is held."""
    hold = HeldFiles.hold

    def late(held: HeldFiles, names: list[str]) -> None:
        if names == ["plan.json"]:
            data = (package / "plan.json").read_bytes()
            (package / "plan.json").write_bytes(data.replace(b"1", b"2", 1))
        hold(held, names)

    monkeypatch.setattr(HeldFiles, "hold", late)
    with pytest.raises(ArtifactError, match=r"plan\.json was altered"):
        open_artifact(package)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_files_are_held_as_long_as_somebody_needs_them(package: Path) -> None:
    gc.collect()
    before = descriptors()
    artifact = open_artifact(package)
    assert before < descriptors() < before + 20  # none for each of the runtime's files
    weights = load_weights(artifact, torch.float32)
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    del artifact
    gc.collect()
    assert descriptors() == before
    assert all(torch.equal(weights[name], copy) for name, copy in copies.items())


def test_a_refusal_holds_nothing(package: Path) -> None:
    (package / "plan.json").write_text("{}")
    gc.collect()
    before = descriptors()
    for _ in range(3):
        with pytest.raises(ArtifactError, match=r"plan\.json holds 2 bytes"):
            open_artifact(package)
    gc.collect()
    assert descriptors() == before


@pytest.mark.parametrize("name", ["plan.json", "moac.json", "moac_runtime/errors.py"])
def test_a_pipe_in_a_file_s_place_holds_nobody_up(package: Path, name: str) -> None:
    (package / name).unlink()
    os.mkfifo(package / name)
    with pytest.raises(ArtifactError, match=r"is not a file|cannot be read"):
        open_artifact(package)


def test_a_file_that_grows_is_read_as_far_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    held = HeldFiles(tmp_path)
    held.hold(["a"])
    assert held.read("a") == b"abc"
    assert not held.replaced()
    assert held.unchanged("a")
    (tmp_path / "b").write_bytes(b"xyz")
    (tmp_path / "b").replace(tmp_path / "a")
    assert held.read("a") == held.path("a").read_bytes() == b"abc"
    assert not held.unchanged("a")
    (tmp_path / "a").unlink()
    assert not held.unchanged("a")


@needs_compiler
@needs_avx2
def test_kernels_of_one_package_are_never_taken_for_another_s(
    cpu_package: Path, tmp_path: Path
) -> None:
    """The system's linker knows libraries by their paths, and descriptors are numbered anew."""
    script = """
import sys
from moac_runtime.backends.cpu.library import packaged_library
from moac_runtime.package.artifact import open_artifact

def library(path):
    return packaged_library(open_artifact(path, trust=True), "kernels/cpu/avx2.so")

first, second = map(library, sys.argv[1:])
print(first._handle != second._handle, library(sys.argv[1]) is first)
"""
    other = Path(shutil.copytree(cpu_package, tmp_path / "out"))
    with (other / "kernels" / "cpu" / "avx2.so").open("ab") as file:
        file.write(b"\0")  # the same kernels, another file
    resealed(other)
    done = subprocess.run(
        [sys.executable, "-c", script, cpu_package, other],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stdout.split() == ["True", "True"], done.stderr
