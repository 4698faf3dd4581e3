"""What is kept between runs: written whole, found out where it is damaged, and made again."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_kernels import needs_compiler
from safetensors.torch import load_file, save_file
from tiny import Compiled, moac_command, plan_options

from moac.packaging import cpu_kernels
from moac.packaging.cpu_kernels import built_library, emit_cpu_kernels
from moac.store import atomic
from moac.store.atomic import PARTIAL, is_abandoned, write_whole
from moac.store.kept import Damaged, Header, read_result, write_result
from moac.store.rename import ASIDE
from moac.store.workspace import Workspace
from moac_runtime.errors import MoacError

Capture = pytest.CaptureFixture[str]
Damage = Callable[[Path], object]

KEY = "0123456789abcdef0123"
TABLE = torch.tensor([[1.5, math.inf], [-2.0, 0.25]])
SAMPLES = [{"domain": "text", "token_ids": [1, 2, 3], "loss": 1.25}]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "work", "tiny", "f" * 64)


@pytest.fixture
def results(workspace: Workspace) -> dict[str, Path]:
    """A result of either format, by the suffix of its file."""
    workspace.save_json("calibration", KEY, SAMPLES)
    workspace.save_tensors("profile", KEY, {"influence": TABLE})
    return {path.suffix[1:]: path for path in workspace.root.iterdir()}


def kept(workspace: Workspace) -> list[str]:
    return sorted(path.name for path in workspace.root.iterdir())


# ---- what is read back


def test_results_are_read_back(workspace: Workspace, results: dict[str, Path]) -> None:
    again = Workspace(workspace.root)  # whoever reads, whatever its checkpoint is called
    assert again.load_json("calibration", KEY) == SAMPLES
    found = again.load_tensors("profile", KEY)
    assert found is not None
    assert found.keys() == {"influence"}
    assert torch.equal(found["influence"], TABLE)
    assert again.load_json("loss", KEY) is None
    assert again.load_json("calibration", "0" * 20) is None
    header, _ = read_result(results["json"])
    assert header == Header("calibration", KEY, "tiny", "f" * 64)


def test_a_value_that_is_no_number_is_read_back_as_one(workspace: Workspace) -> None:
    workspace.save_json("loss", KEY, math.nan)
    assert math.isnan(workspace.load_json("loss", KEY))


def cut(share: float) -> Damage:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return damage


def text(content: str) -> Damage:
    return lambda path: path.write_text(content)


def inside(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return damage


def tensors(**given: torch.Tensor) -> Damage:
    return lambda path: save_file(given, path)


def under_the_old_header(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """A valid file with the metadata that was written, and other contents."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        changed = {name: change(tensor).contiguous() for name, tensor in load_file(path).items()}
        save_file(changed, path, metadata=header["__metadata__"])

    return damage


def another_result(path: Path) -> None:
    other = path.with_name(f"{path.name[: -len(path.suffix)][:-20]}{'a' * 20}{path.suffix}")
    header, value = read_result(path)
    write_result(other, Header(header.kind, "a" * 20), value)
    other.replace(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


EITHER: list[Damage] = [
    *(cut(0), cut(0.1), cut(0.5), cut(0.99)),
    *(text("\x00" * 64), text("{"), text("[" * 100_000), another_result, loop),
]
OF_JSON: list[Damage] = [
    *(text("null"), text("NaN"), text("[]"), text("{}"), text('"x"'), text('{"value": 1}')),
    *(inside(lambda d: d.update(value=None)), inside(lambda d: d.update(value=[])),
      inside(lambda d: d.update(value=math.nan)), inside(lambda d: d["value"][0].pop("loss")),
      inside(lambda d: d["moac"].update(source="other")), inside(lambda d: d.pop("sha256")),
      inside(lambda d: d.update(moac=7)), inside(lambda d: d.update(sha256=7))),
]  # fmt: skip
OF_TENSORS: list[Damage] = [
    *(tensors(influence=TABLE), tensors(other=TABLE), tensors(), text("null")),
    *(under_the_old_header(lambda t: t * math.nan), under_the_old_header(lambda t: t[:1]),
      under_the_old_header(lambda t: t.half()), under_the_old_header(lambda t: t.reshape(4)),
      under_the_old_header(lambda t: t.to(torch.bfloat16))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *(("json", damage) for damage in (*EITHER, *OF_JSON)),
        *(("safetensors", damage) for damage in (*EITHER, *OF_TENSORS)),
    ],
)
def test_a_damaged_result_is_told_in_a_line_and_made_again(
    workspace: Workspace, results: dict[str, Path], capsys: Capture, suffix: str, damage: Damage
) -> None:
    path = results[suffix]
    damage(path)

    def load() -> Any:
        if suffix == "json":
            return workspace.load_json("calibration", KEY)
        return workspace.load_tensors("profile", KEY)

    assert load() is None
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"note: {path} ")
    assert err.endswith("; it is made again\n")
    assert err.count("\n") == 1
    workspace.save_json("calibration", KEY, SAMPLES)
    workspace.save_tensors("profile", KEY, {"influence": TABLE})
    assert load() is not None
    assert not path.is_symlink()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_no_changed_bit_passes(results: dict[str, Path], suffix: str) -> None:
    path = results[suffix]
    whole = path.read_bytes()
    _, expected = read_result(path)
    for place in range(len(whole)):
        for bit in (1, 16):
            changed = bytearray(whole)
            changed[place] ^= bit
            path.write_bytes(changed)
            try:
                header, value = read_result(path)
            except Damaged:
                continue
            # a space of the padding, or of JSON's own, says nothing
            assert header == Header(header.kind, KEY, "tiny", "f" * 64)
            assert same(value, expected), (place, bit)


def same(value: Any, expected: Any) -> bool:
    if not isinstance(value, dict):
        return bool(value == expected)
    return all(np.array_equal(value[name], expected[name]) for name in expected)


def test_a_file_that_may_not_be_read_is_made_again(
    workspace: Workspace,
    results: dict[str, Path],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # the permissions bind no superuser
        patch.setattr(Path, "read_bytes", refused)
        assert workspace.load_json("calibration", KEY) is None
    told = f"note: {results['json']} cannot be read (Permission denied); it is made again\n"
    assert capsys.readouterr().err == told


def test_a_folder_in_its_place_is_left_and_told(
    workspace: Workspace, results: dict[str, Path], capsys: Capture
) -> None:
    results["json"].unlink()
    results["json"].mkdir()
    (results["json"] / "mine.txt").write_text("mine")
    assert workspace.load_json("calibration", KEY) is None
    workspace.save_json("calibration", KEY, SAMPLES)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("; ")[-1] for line in lines] == ["it is made again", "move it away"]
    assert (results["json"] / "mine.txt").read_text() == "mine"
    assert not [name for name in kept(workspace) if name.startswith(PARTIAL)]


# ---- how it is written


def test_a_result_is_on_the_disk_before_it_is_named(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(number: int) -> None:
        fsync(number)
        name = Path(os.readlink(f"/proc/self/fd/{number}")).name
        size = os.fstat(number).st_size
        done.append(f"synced {PARTIAL} {size > 100}" if name.startswith(PARTIAL) else name)

    def named(path: Path, target: Path) -> Path:
        done.append("named")
        return replace(path, target)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr(Path, "replace", named)
    workspace.save_json("loss", KEY, 1.5)
    assert done == [f"synced {PARTIAL} True", "named", "work"]
    done.clear()
    workspace.save_tensors("profile", KEY, {"influence": TABLE})
    assert done == [f"synced {PARTIAL} True", "named", "work"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_write_that_fails_leaves_what_was_there(
    workspace: Workspace,
    results: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    def fails(_: int) -> None:
        raise OSError(code, os.strerror(code))

    before, names = results["json"].read_bytes(), kept(workspace)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fails)
        with pytest.raises(MoacError) as caught:
            workspace.save_json("calibration", KEY, [])
    sentence = str(caught.value)
    assert sentence.startswith(f"cannot write to the work folder {workspace.root}: ")
    assert os.strerror(code) in sentence
    assert ("moac clean" in sentence) == (code == errno.ENOSPC)
    assert "--work-dir" in sentence
    assert results["json"].read_bytes() == before
    assert kept(workspace) == names


@pytest.mark.parametrize("place", ["file", "file/work", "loop"])
def test_a_work_folder_that_is_none(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(MoacError, match="cannot write to the work folder"):
        Workspace(tmp_path / place).prepare()
    assert (tmp_path / "file").read_text() == "mine"


def test_files_get_the_permissions_that_others_get(results: dict[str, Path]) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in results.values()} == {0o666 & ~mask}


# ---- several processes


WRITER = """
import sys, time
from pathlib import Path
from moac.store import atomic
def halt(*_):
    print("writing", flush=True)
    time.sleep(60)
atomic.os.fsync = halt
atomic.write_whole(Path(sys.argv[1]) / "loss-0123456789abcdef0123.json", b"x" * 9)
"""


def test_what_a_killed_run_left_goes_and_what_another_writes_stays(workspace: Workspace) -> None:
    workspace.root.mkdir()
    old = workspace.root / f"{PARTIAL}abcdefgh"
    old.write_bytes(b"half")
    (workspace.root / f"{PARTIAL}folder").mkdir()
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(workspace.root)], stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        workspace.prepare()
        (left,) = workspace.root.iterdir()
        assert left.read_bytes() == b"x" * 9
        assert not is_abandoned(left)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    assert is_abandoned(left)
    workspace.prepare()
    assert kept(workspace) == []


def test_what_was_moved_aside_is_nobodys_to_sweep(workspace: Workspace) -> None:
    """A process killed between two renames leaves the old folder under such a name alone."""
    aside = workspace.root / f"{PARTIAL}0123456789abcdef{ASIDE}"
    aside.mkdir(parents=True)
    workspace.prepare()
    assert list(workspace.root.iterdir()) == [aside]


def test_what_is_taken_for_abandoned_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, swept = fcntl.flock, []

    def late(number: int, how: int) -> None:
        if not swept:
            swept.append(next(tmp_path.iterdir()))
            swept[0].unlink()
        flock(number, how)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    write_whole(tmp_path / "result", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result").read_bytes() == b"whole"
    assert swept


def test_two_runs_may_write_the_same_result(workspace: Workspace) -> None:
    def write() -> None:
        for _ in range(20):
            workspace.save_json("calibration", KEY, SAMPLES)
            workspace.prepare()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept(workspace) == [f"calibration-{KEY}.json"]
    assert workspace.load_json("calibration", KEY) == SAMPLES


# ---- native kernels


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Builds that were made; they are quick, and no kernels."""
    made: list[str] = []

    def build(folder: Path, names: list[str]) -> None:
        made.extend(names)
        for name in names:
            (folder / f"{name}.so").write_bytes(b"machine code")
            (folder / f"{name}.json").write_text("{}")

    monkeypatch.setattr(cpu_kernels, "build_cpu", build)
    monkeypatch.setattr(cpu_kernels, "build_key", lambda names: KEY)
    return made


def fill(data: bytes) -> Damage:
    return lambda folder: (folder / "avx2.so").write_bytes(data)


def torn(folder: Path) -> None:
    (folder / "avx2.so").unlink()


def untold(folder: Path) -> None:
    (folder / "kept.json").unlink()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def an_empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "damage", [fill(b""), fill(b"machine cod\xe5"), torn, untold, a_file, an_empty_folder]
)
def test_damaged_kernels_are_built_again(
    tmp_path: Path, builds: list[str], capsys: Capture, damage: Damage
) -> None:
    library = built_library(tmp_path, "avx2")
    assert built_library(tmp_path, "avx2") == library
    assert builds == ["avx2"]
    damage(library.parent)
    assert built_library(tmp_path, "avx2") == library
    assert builds == ["avx2", "avx2"]
    assert library.read_bytes() == b"machine code"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {library.parent} ")
    assert [path.name for path in tmp_path.iterdir()] == [library.parent.name]


def test_a_build_that_is_broken_off_is_not_there(tmp_path: Path, builds: list[str]) -> None:
    def killed(folder: Path, _: object) -> None:
        (folder / "avx2.so").write_bytes(b"mach")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "build_cpu", killed)
        with pytest.raises(KeyboardInterrupt):
            built_library(tmp_path, "avx2")
    assert list(tmp_path.iterdir()) == []
    emit_cpu_kernels(tmp_path / "out", ["cpu:avx2"], tmp_path / "work")
    found = {path.name for path in (tmp_path / "out/kernels/cpu").iterdir()}
    assert found == {"avx2.so", "avx2.json"}


@needs_compiler
def test_a_work_folder_on_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr(cpu_kernels, "build_cpu", lambda folder, _: (folder / "a").touch())
    with pytest.raises(MoacError, match="cannot write to the work folder"):
        built_library(tmp_path, "avx2")


# ---- a whole run


def test_a_run_goes_on_over_a_damaged_work_folder(
    tiny_package: Compiled, tmp_path: Path, capsys: Capture
) -> None:
    work = Path(shutil.copytree(tiny_package.work_dir, tmp_path / "work"))
    asked = ["plan", tiny_package.checkpoint, *plan_options(), "--work-dir", work]
    for path in work.iterdir():
        os.utime(path, (0, 0))
    assert moac_command(*asked, "-o", tmp_path / "whole.json") == 0
    # other tests' results lie there too
    used = sorted(path for path in work.iterdir() if path.stat().st_mtime > 0)
    kinds = ("profile", "loss", "calibration")
    damaged = [p for kind in kinds for p in [p for p in used if p.name.startswith(kind)][:2]]
    assert len(damaged) == 6
    for path in damaged:
        path.write_bytes(b"")
    for again in ("first", "second"):
        capsys.readouterr()
        assert moac_command(*asked, "-o", tmp_path / f"{again}.json") == 0
        err = capsys.readouterr().err.splitlines()
        told = {line for line in err if line.startswith("note: ")}
        expected = {f"note: {path} is empty; it is made again" for path in damaged}
        assert told == (expected if again == "first" else set())
        plan = json.loads((tmp_path / f"{again}.json").read_text())
        assert (
            plan["rules"] == json.loads((tiny_package.package / "plan.json").read_text())["rules"]
        )
