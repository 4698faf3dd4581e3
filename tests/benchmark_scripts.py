"""The scripts of benchmarks/ as modules, and the moac commands they run, in this process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tiny import Compiled, moac_command, plan_options

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

made = import_module("made")

Run = Callable[..., tuple[dict[str, Any], str, list[str]]]
"""What a benchmark wrote, what it printed, and the moac commands it took."""


def tiny_run(
    main: Callable[[list[str]], int],
    compiled: Compiled,
    folder: Path,
    patch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    efforts: Sequence[str],
) -> Run:
    """Run a benchmark on the tiny model in `folder`, from what its compile has kept."""
    for effort in efforts:
        shutil.copytree(compiled.work_dir, folder / "work" / f"kept-{effort}")

    def run(*more: str) -> tuple[dict[str, Any], str, list[str]]:
        asked: list[str] = []

        def here(arguments: Sequence[str]) -> dict[str, Any]:
            asked.append(arguments[0])
            capsys.readouterr()
            assert moac_command(*arguments, "--json") == 0
            found: dict[str, Any] = json.loads(capsys.readouterr().out)
            return found

        patch.setattr(made, "run_moac", here)
        words = [str(compiled.checkpoint), "--packaging", "--target torch"]
        words += ["--planning", " ".join(plan_options()), "--work-dir", str(folder / "work")]
        capsys.readouterr()
        assert main([*words, "--out", str(folder / "out.json"), *more]) == 0
        printed = capsys.readouterr().out
        return json.loads((folder / "out.json").read_bytes()), printed, asked

    return run
