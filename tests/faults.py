"""Compiles that are killed, run out of disk, or see the clock jump."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE / "faults.c"


def build(folder: Path) -> Path:
    """The library that is preloaded, from `faults.c`."""
    library = folder / "faults.so"
    command = ["cc", "-Wall", "-Werror", "-O1", "-fPIC", "-shared", "-o", library, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return library


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`moac ARGUMENTS`, and what befalls it.

    Calls that write below `folder` are counted; with `mode` "full" the disk is full from call
    number `at` on, with "kill" the process is killed before it. `killed_after`: seconds from the
    start, whatever it is doing. `stdout`, `stderr`: files for what it says. `tells_modules`:
    whether it tells in the end what it has imported.
    """

    arguments: list[str]
    folder: str
    stdout: str
    stderr: str
    mode: str = "count"
    at: int = -1
    killed_after: float | None = None
    clock_jumps: int = 0
    tells_modules: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run ended: its exit code (-9: killed) and what it said on standard error.

    `calls`: that wrote, None where it was killed. `seconds`: wall time.
    """

    code: int
    stderr: str
    seconds: float
    calls: int | None
    modules: list[str] = field(repr=False)


class Driver:
    """A warm process that runs commands in children (`fault_driver.py`); close it in the end."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        paths = [str(HERE), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, HERE / "fault_driver.py"],
            env={
                **os.environ,
                "LD_PRELOAD": str(build(folder)),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, folder: Path, **fault: Any) -> Ended:
        """One command with one fault; see `Run`."""
        (ended,) = self.together([(arguments, {"folder": str(folder), **fault})])
        return ended

    def together(self, asked: list[tuple[tuple[object, ...], dict[str, Any]]]) -> list[Ended]:
        """Commands side by side, each with its fault."""
        runs = [self._run(arguments, fault) for arguments, fault in asked]
        told = self._ask([], runs)
        return [
            Ended(
                code=one["code"],
                stderr=Path(run.stderr).read_text(encoding="utf-8"),
                seconds=one["seconds"],
                calls=one.get("calls"),
                modules=one.get("modules", []),
            )
            for run, one in zip(runs, told, strict=True)
        ]

    def warm(self, modules: list[str]) -> None:
        """Import what a run has imported, so that later ones need not."""
        self._ask(modules, [])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _run(self, arguments: tuple[object, ...], fault: dict[str, Any]) -> Run:
        self._number += 1
        said = [str(self._folder / f"{self._number}.{name}") for name in ("out", "err")]
        words = [str(word) for word in arguments]
        return Run(arguments=words, stdout=said[0], stderr=said[1], **fault)

    def _ask(self, modules: list[str], runs: list[Run]) -> list[dict[str, Any]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"modules": modules, "runs": [asdict(run) for run in runs]})
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        told: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        return told
