"""What a person types, or a pipe holds: texts of one line or many, with a history."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

_QUOTES = '"""'
_KEPT = 1000  # lines of history


class Lines:
    """Texts from standard input. `terminal`: whether a person types them.

    A line that ends in a backslash goes on in the next one; three quotes open and close a text of
    many lines.
    """

    def __init__(self) -> None:
        self.terminal = sys.stdin is not None and sys.stdin.isatty()
        self._history = _history_file() if self.terminal else None
        if self._history is not None:
            _read_history(self._history)

    def read(self) -> str | None:
        """The next text, None where the input has ended."""
        line = self._line("> ")
        if line is None:
            return None
        if line.lstrip().startswith(_QUOTES):
            return self._quoted(line.lstrip().removeprefix(_QUOTES))
        parts = [line]
        while parts[-1].endswith("\\"):
            parts[-1] = parts[-1][:-1]
            following = self._line(". ")
            if following is None:
                break
            parts.append(following)
        return "\n".join(parts)

    def _quoted(self, first: str) -> str:
        parts = [first]
        while _QUOTES not in parts[-1]:
            line = self._line(". ")
            if line is None:
                break
            parts.append(line)
        return "\n".join(parts).rpartition(_QUOTES)[0].strip("\n") or "\n".join(parts)

    def _line(self, prompt: str) -> str | None:
        if not self.terminal:
            line = "" if sys.stdin is None else sys.stdin.readline()
            return line.removesuffix("\n") if line else None
        try:
            with _prompting():
                typed = input(prompt)
        except EOFError:
            print(file=sys.stderr)
            return None
        if self._history is not None:
            _write_history(self._history)
        return typed


@contextmanager
def _prompting() -> Iterator[None]:
    """Prompts go to descriptor 1, where line editing wants them; results have another one."""
    with os.fdopen(1, "w", closefd=False) as stream, redirect_stdout(stream):
        yield


def _history_file() -> Path | None:
    """Where lines are kept between conversations, None where this host edits no lines."""
    try:
        import readline  # noqa: F401 - `input` edits lines once it is there
    except ImportError:  # Windows has no such module
        return None
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "moac" / "chat_history"


def _read_history(path: Path) -> None:
    import readline

    readline.set_history_length(_KEPT)
    with suppress(OSError):  # there is none yet
        readline.read_history_file(path)


def _write_history(path: Path) -> None:
    import readline

    with suppress(OSError):  # a history is no reason to end a conversation
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        readline.write_history_file(path)
