"""Long work shows itself on stderr: one bar with the time left on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Protocol

import click

from moac.progress.eta import Amounts, Steady, TimeLeft

Part = Callable[[int, int], None]

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_LOOKS = 1.0


class _Display(Protocol):
    """`look` is called every second, from a thread of its own."""

    def begin(self, name: str) -> None: ...

    def look(self, name: str) -> None: ...

    def end(self, name: str, seconds: float) -> None: ...


class _UnderWay:
    """Work under way: its time left, and its display."""

    def __init__(self, left: TimeLeft, display: _Display) -> None:
        self.left, self._display = left, display
        self._stage: str | None = None

    @contextmanager
    def stage(self, name: str, amounts: Amounts | None) -> Iterator[None]:
        started = time.monotonic()
        self.left.begin(name, amounts)
        self._display.begin(name)
        self._stage = name
        try:
            yield
        finally:
            self._stage = None
        self.left.end()
        self._display.end(name, time.monotonic() - started)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look every second, whatever the work itself is at."""
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join()

    def _watch(self, over: threading.Event) -> None:
        # stderr may be closed meanwhile, which the work itself is told when it writes there
        with suppress(OSError, ValueError):
            while not over.wait(_SECONDS_BETWEEN_LOOKS):
                if (name := self._stage) is not None:
                    self._display.look(name)


_under_way: ContextVar[_UnderWay | None] = ContextVar("_under_way", default=None)


@contextmanager
def whole(left: TimeLeft) -> Iterator[None]:
    """Work of several stages, whose time left is told as one."""
    with _shown(left, " in all"):
        yield


@contextmanager
def stage(name: str, amounts: Amounts | None = None) -> Iterator[None]:
    """A stage of the work under way, or work of its own.

    `amounts`: what it has to do by kind of step, in place of what was planned for it.
    """
    work = _under_way.get()
    with ExitStack() as stack:
        if work is None:
            work = stack.enter_context(_shown(TimeLeft({name: amounts or {}}), ""))
        with work.stage(name, amounts):
            yield


@contextmanager
def step(kind: str, amount: float | None = None) -> Iterator[Part]:
    """A step of the stage under way: so much of a kind, or all that is left of it there.

    Yields `part(done, total)`, which a step of equal parts may call after each.
    """
    work = _under_way.get()
    if work is None:
        yield lambda done, total: None
        return
    work.left.start(kind, amount)
    try:
        yield work.left.part
    except BaseException:
        work.left.drop()
        raise
    work.left.finish()


def passed(kind: str, amount: float) -> None:
    """A step that needs no work, since its result was kept from an earlier run."""
    work = _under_way.get()
    if work is not None:
        work.left.passed(kind, amount)


def notes(texts: Iterable[str]) -> None:
    """Say what a user should know before the work begins, a line each."""
    for text in texts:
        click.echo(f"note: {text}", err=True)


@contextmanager
def _shown(left: TimeLeft, of: str) -> Iterator[_UnderWay]:
    text = _Text(left, of)
    with _bar(text) if sys.stderr.isatty() else nullcontext(_Lines(text)) as display:
        work = _UnderWay(left, display)
        token = _under_way.set(work)
        try:
            with work.watched():
                yield work
        finally:
            _under_way.reset(token)


class _Text:
    """The time left in words; empty while nothing is known of it."""

    def __init__(self, left: TimeLeft, of: str) -> None:
        self._left, self._of, self._steady = left, of, Steady()

    def now(self) -> tuple[str, float]:
        """And the share of the whole time that has passed, 0 where it is not known."""
        seconds, elapsed = self._left.seconds(), self._left.elapsed
        if not seconds:
            return "", 0.0
        told = self._steady.tell(seconds, elapsed)
        return f"{told} left{self._of}", elapsed / (elapsed + seconds)


class _Lines:
    def __init__(self, text: _Text) -> None:
        self._text = text
        self._began = self._last = 0.0

    def begin(self, name: str) -> None:
        self._began = time.monotonic()
        self._say(name, "started", self._text.now()[0])

    def look(self, name: str) -> None:
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            so_far = f"{time.monotonic() - self._began:.0f} s so far"
            self._say(name, self._text.now()[0] or so_far)

    def end(self, name: str, seconds: float) -> None:
        self._say(name, f"done in {seconds:.1f} s")

    def _say(self, name: str, *words: str) -> None:
        self._last = time.monotonic()
        click.echo(f"{name}: {', '.join(filter(None, words))}", err=True)


def _bar(text: _Text) -> AbstractContextManager[_Display]:
    from moac.progress.bar import shown_bar

    return shown_bar(text.now)
