"""Hostile inputs by the thousand: `python tests/hostile/fuzz.py [PARSER...] --cases 10000`.

Cases are drawn by hypothesis, or, with --engine atheris, by what code they reach (which needs
atheris, and installs nothing). Each parser runs in a process of its own, held to its limits by the
system; an input that breaks it is kept and named, and `--case FILE` runs it again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [
    str(HERE),
    str(HERE.parent),
    str(ROOT),
    str(ROOT / "runtime"),
    str(ROOT / "kernels"),
]
os.environ.update(
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

from guard import Guard  # noqa: E402
from targets import TARGETS  # noqa: E402

AT_ONCE = {"hypothesis": 5000}
"""Cases of one process, by engine: hypothesis remembers all that it drew."""


def main(arguments: list[str] | None = None) -> int:
    """Fuzz, print a line of JSON for each parser, and return 1 where one broke."""
    asked = _options().parse_args(arguments)
    names = asked.parsers or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        print(f"error: there is no parser {unknown[0]}; choose from {', '.join(TARGETS)}")
        return 2
    if asked.within:
        return _within(names[0], asked)
    return max(_parser(name, asked) for name in names)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parsers", nargs="*", metavar="PARSER", help=", ".join(TARGETS))
    parser.add_argument("--cases", type=int, default=1000, help="of each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--engine", choices=("hypothesis", "random", "atheris"), default="hypothesis"
    )
    parser.add_argument("--case", type=Path, help="an input to run again")
    parser.add_argument(
        "--found", type=Path, default=Path(tempfile.gettempdir()), metavar="FOLDER"
    )
    parser.add_argument("--within", action="store_true", help=argparse.SUPPRESS)
    return parser


# ---- the process that watches


def _parser(name: str, asked: argparse.Namespace) -> int:
    """All cases of a parser, some thousand a process."""
    asked.found.mkdir(parents=True, exist_ok=True)
    started, whole = time.monotonic(), {"parser": name, "cases": 0, "accepted": 0, "refused": 0}
    sentences, part = 0, AT_ONCE.get(asked.engine, asked.cases)
    for first in range(0, asked.cases, part):
        told = _part(name, min(part, asked.cases - first), asked.seed + first, asked)
        if told is None:
            return 1
        for key in ("cases", "accepted", "refused"):
            whole[key] += told[key]
        sentences = max(sentences, told["sentences"])
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({**whole, "sentences": sentences, "seconds": seconds}), flush=True)
    return 0


def _part(name: str, cases: int, seed: int, asked: argparse.Namespace) -> dict[str, Any] | None:
    last = asked.found / f"{name}-{seed}.case"
    words = [name, "--within", "--cases", cases, "--seed", seed, "--engine", asked.engine]
    words += ["--case", asked.case] if asked.case else ["--found", last]
    done = subprocess.run(
        [sys.executable, HERE / "fuzz.py", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        last.unlink(missing_ok=True)
        return json.loads(lines[-1])
    print(
        f"{name} broke (exit code {done.returncode}) on the input {asked.case or last}",
        file=sys.stderr,
    )
    return None


# ---- the process that is watched


def _within(name: str, asked: argparse.Namespace) -> int:
    case = asked.case.read_bytes() if asked.case else b""
    with tempfile.TemporaryDirectory(prefix="moac-hostile-") as folder:
        target = TARGETS[name](Path(folder))
        os.chdir(folder)  # what is opened below a descriptor is told without its folder
        guard = Guard(target, Path(folder), None if asked.case else asked.found)
        if asked.case:
            guard.check(case)
        else:
            target.run(target.valid)  # which loads what is loaded once
            guard.limit_memory()
            _ENGINES[asked.engine](guard, target, asked)
        print(json.dumps(guard.tally.to_json()), flush=True)
    return 0


def _by_hypothesis(guard: Guard, target: Any, asked: argparse.Namespace) -> None:
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st

    @seed(asked.seed)
    @settings(
        max_examples=asked.cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def explore(rng: Random) -> None:
        guard.check(target.make(rng))

    explore()


def _by_random(guard: Guard, target: Any, asked: argparse.Namespace) -> None:
    for number in range(asked.cases):
        guard.check(target.make(Random(f"{asked.seed}/{number}")))


def _by_atheris(guard: Guard, target: Any, asked: argparse.Namespace) -> None:
    import atheris

    def one(data: bytes) -> None:
        guard.check(target.make(_Given(data)))

    atheris.instrument_all()
    atheris.Setup(["fuzz", f"-runs={asked.cases}", f"-seed={asked.seed + 1}", "-max_len=512"], one)
    atheris.Fuzz()


class _Given(Random):
    """Random choices read from bytes, then from a generator that they seed."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._bytes = iter(data)

    def getrandbits(self, bits: int) -> int:
        read = [next(self._bytes, None) for _ in range((bits + 7) // 8)]
        if None in read:
            return super().getrandbits(bits)
        return int.from_bytes(bytes(filter(None, read)), "little") % (1 << bits)

    def random(self) -> float:
        return self.getrandbits(24) / 2**24


_ENGINES = {"hypothesis": _by_hypothesis, "random": _by_random, "atheris": _by_atheris}

if __name__ == "__main__":
    sys.exit(main())
