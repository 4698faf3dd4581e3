"""What must hold for every hostile input, and the process in which it is held to it.

A case ends well or in one sentence of ours. Nothing else is raised or printed, no file outside of
its folder is opened, it takes seconds at most, and no more than 1 GiB of memory.
"""

from __future__ import annotations

import faulthandler
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from moac_runtime.errors import MoacError

MEMORY = 2**30
SECONDS = 5.0
"""Of processor time; what waits for ever is ended by the clock."""
HANG_S = 90
_CODE = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]))
_SYSTEM = ("/proc/", "/sys/", "/usr/", "/etc/localtime", "/dev/null", "/dev/urandom", "/lib/")
_WRITING = os.O_WRONLY | os.O_RDWR
_OPENING = ("open", "os.remove", "os.rename", "os.mkdir", "os.symlink", "os.link", "os.rmdir")


class Broken(AssertionError):
    """What a case did that none may do."""


@dataclass(frozen=True, slots=True)
class Target:
    """A parser: `make` draws a hostile input, `run` reads it. `valid`: one that goes through."""

    valid: bytes
    make: Callable[[Random], bytes]
    run: Callable[[bytes], None]


@dataclass(slots=True)
class Tally:
    """What became of the cases. `sentences`: the refusals, without names and numbers."""

    cases: int = 0
    accepted: int = 0
    sentences: set[str] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "accepted": self.accepted,
            "refused": self.cases - self.accepted,
            "sentences": len(self.sentences),
        }


class Guard:
    """Runs cases of `target` in `folder`; for the rest of this process."""

    def __init__(self, target: Target, folder: Path, last: Path | None = None) -> None:
        self.tally = Tally()
        self._target, self._last = target, last
        self._folders = (str(folder), os.path.realpath(folder))
        self._watching = False
        self._opened: list[str] = []
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - for as long as the process runs
        sys.addaudithook(self._hear)
        warnings.simplefilter("error")

    def limit_memory(self) -> None:
        """Leave 1 GiB more than this process takes now."""
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))

    def check(self, data: bytes) -> None:
        """Run one case. Raises Broken, and what a parser must not raise."""
        if self._last is not None:
            self._last.write_bytes(data)
        started = time.process_time()
        with self._watched():
            sentence = self._outcome(data)
        self.tally.cases += 1
        if sentence is None:
            self.tally.accepted += 1
        else:
            self.tally.sentences.add(_kind(sentence))
            _check_sentence(sentence)
        if (taken := time.process_time() - started) > SECONDS:
            raise Broken(f"it took {taken:.1f} s")

    def _outcome(self, data: bytes) -> str | None:
        """The sentence of a refusal, None for a case that went through."""
        try:
            self._target.run(data)
        except MoacError as error:
            return str(error)
        return None

    @contextmanager
    def _watched(self) -> Iterator[None]:
        kept, before = os.dup(2), self._printed.seek(0, os.SEEK_END)
        faulthandler.dump_traceback_later(HANG_S, exit=True, file=kept)
        os.dup2(self._printed.fileno(), 2)
        self._opened, self._watching = [], True
        try:
            yield
        finally:
            self._watching = False
            faulthandler.cancel_dump_traceback_later()
            os.dup2(kept, 2)
            os.close(kept)
        self._printed.seek(before)
        if text := self._printed.read():
            raise Broken(f"it printed {text[:300]!r}")
        if self._opened:
            raise Broken(f"it opened {self._opened[:3]}")

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if (
            not self._watching
            or event not in _OPENING
            or not isinstance(arguments[0], str | bytes)
        ):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        writing = event != "open" or bool((arguments[2] or 0) & _WRITING)
        allowed = self._folders if writing else (*self._folders, *_CODE, *_SYSTEM)
        if not path.startswith(allowed) and path != os.devnull and "__pycache__" not in path:
            self._opened.append(f"{event} {path}")


def _check_sentence(sentence: str) -> None:
    if not sentence.strip() or len(sentence) > 4000 or sentence.endswith("."):
        raise Broken(f"no sentence: {sentence[:300]!r}")
    if any(ord(character) < 32 for character in sentence):
        raise Broken(f"more than a line: {sentence[:300]!r}")
    if "not enough memory" in sentence:
        raise Broken(sentence)


def _kind(sentence: str) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"|\S*[\d/\\]\S*|\[.*\]", "_", sentence)[:80]
