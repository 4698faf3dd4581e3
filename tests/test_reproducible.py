"""The same inputs give the same package, byte for byte, wherever and whenever it is made."""

from __future__ import annotations

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
from tiny import CONTEXT, Compiled, moac_command, options, plan_options

from moac.packaging.build_record import BUILD, read_build
from moac_runtime.package.integrity import package_files

HERE = Path(__file__).parent
COMPILE = "import torch; torch.set_num_threads(1); from moac.cli.main import main; main()"
TEXTS = '{"prompt": "Remember the key.", "response": "The key."}\n'


def compiled(
    checkpoint: Path, place: Path, choices: list[str], *, environment: dict[str, str]
) -> Path:
    """Compile a copy of `checkpoint`, in a process of its own, to `place/out`, all made there."""
    source, texts = place / "models" / checkpoint.name, place / "own.jsonl"
    shutil.copytree(checkpoint, source)
    texts.write_text(TEXTS)
    words = ["compile", source.relative_to(place), "-o", "out", "--calibration", texts, *choices]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *map(str, words)],
        cwd=place,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
            "OMP_NUM_THREADS": "1",
            "MOAC_CACHE": str(place / "kept"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return place / "out"


def assert_same(one: Path, other: Path) -> None:
    names = list(package_files(one))
    assert list(package_files(other)) == names
    differing = [
        name
        for name in names
        if name != BUILD and (one / name).read_bytes() != (other / name).read_bytes()
    ]
    assert differing == []


def compiled_twice(checkpoint: Path, tmp_path: Path, choices: list[str]) -> tuple[Path, Path]:
    """With nothing in common but the checkpoint's name: folders, caches, hash seeds, zones."""
    places = tmp_path / "a", tmp_path / "another one" / "of a longer name"
    for place in places:
        place.mkdir(parents=True)
    surroundings = (
        {"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C", "USER": "one"},
        {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8", "USER": "other",
         "TMPDIR": str(places[1])},
    )  # fmt: skip
    one, other = (
        compiled(checkpoint, place, choices, environment=around)
        for place, around in zip(places, surroundings, strict=True)
    )
    return one, other


def test_a_package_is_the_same_wherever_it_is_made(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint("llama", max_position_embeddings=CONTEXT)
    one, other = compiled_twice(checkpoint, tmp_path, options(rules_per_layer=1))
    assert_same(one, other)
    for package in (one, other):
        assert str(package.parent) not in "".join(
            path.read_text(encoding="utf-8", errors="replace")
            for path in package.rglob("*")
            if path.suffix in (".json", ".html")
        )
    assert moac_command("diff", one, other) == 0
    assert "are the same, byte for byte" in capsys.readouterr().out


@pytest.mark.slow
@needs_compiler
@needs_avx2
@pytest.mark.parametrize(
    "choices",
    [
        ["--target", "torch,cpu,onnx"],
        ["--target", "torch,cpu:avx2", "--weights", "int8", "--dtype", "bfloat16"],
        ["--target", "torch,cpu:avx2,onnx", "--weights", "int4"],
        ["--target", "torch,cuda:90"],
    ],
    ids=["native and ONNX", "8 bits", "4 bits", "CUDA"],
)
def test_kernels_and_graphs_are_the_same_too(
    choices: list[str], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    if "torch,cuda:90" in choices:
        pytest.importorskip("triton")
    checkpoint = tiny_checkpoint("llama", max_position_embeddings=CONTEXT, head_dim=32)
    assert_same(*compiled_twice(checkpoint, tmp_path, [*plan_options(), *choices]))


@pytest.mark.slow
def test_a_plan_is_the_same_too_and_tells_no_time(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama", max_position_embeddings=CONTEXT)
    plans = []
    for name in ("a", "b"):
        file, kept = tmp_path / f"{name}.json", tmp_path / name
        words = ["plan", checkpoint, "-o", file, "--work-dir", kept, *plan_options()]
        assert moac_command(*words) == 0
        plans.append(file.read_bytes())
    assert plans[0] == plans[1]
    assert b"seconds" not in plans[0]


# ---- build.json, which alone tells them apart


def test_times_and_host_stand_in_build_json_alone(tiny_package: Compiled, tmp_path: Path) -> None:
    record = read_build(tiny_package.package)
    assert record is not None
    assert set(record) == {
        *("created", "processor", "threads", "seconds", "estimated_seconds"),
        *("peak_memory_by_stage", "peak_memory_bytes"),
    }
    assert record["processor"].endswith(torch.backends.cpu.get_cpu_capability())
    manifest = json.loads((tiny_package.package / "moac.json").read_text())
    assert BUILD not in manifest["files"]
    for name in ("moac.json", "plan.json", "report.html"):
        text = (tiny_package.package / name).read_text(encoding="utf-8")
        assert record["created"] not in text, name
        assert "seconds" not in text, name


def test_nothing_needs_it(tiny_package: Compiled, tmp_path: Path) -> None:
    package = tmp_path / "out"
    shutil.copytree(tiny_package.package, package)
    (package / BUILD).unlink()
    for command in ("inspect", "verify"):
        assert moac_command(command, package) == 0
    assert moac_command("run", package, "--prompt", "The key", "--max-tokens", "2") == 0
    (package / BUILD).write_text("not what moac wrote")
    assert moac_command("run", package, "--prompt", "The key", "--max-tokens", "2") == 0


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def with_field(name: str, value: object) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "spoil",
    [
        *(text(""), text("[" * 100_000), text("[]"), text(" " * (1 << 17)), link, folder, pipe),
        *(with_field("created", 7), with_field("threads", "2")),
        *(with_field("processor", "a\x1b[31m"), with_field("seconds", {"a\x1b[31m": 1.0})),
        with_field("seconds", {"load": "long"}),
    ],
)  # fmt: skip
def test_another_build_json_is_refused_by_what_shows_it(
    spoil: Callable[[Path], object],
    tiny_package: Compiled,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = tmp_path / "out"
    shutil.copytree(tiny_package.package, package)
    spoil(package / BUILD)
    for words in (("inspect", package), ("diff", tiny_package.package, package)):
        assert moac_command(*words) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.endswith(f"remove {BUILD}, which nothing needs\n")
