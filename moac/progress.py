"""Long work shows itself: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import click

Advance = Callable[[int, int], None]

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def stage(name: str) -> Iterator[Advance]:
    """A stage of a compile on stderr. Yields `advance(done, total)`; call it after each step."""
    if sys.stderr.isatty():
        with _bar(name) as advance:
            yield advance
    else:
        with _lines(name) as advance:
            yield advance


@contextmanager
def _bar(name: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description:<12}"), BarColumn(), TextColumn("{task.fields[of]}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), "left", Remaining(), console=console) as bar:
        task = bar.add_task(name, total=None, of="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, of=f"{done}/{total}")

        yield advance
        bar.update(task, completed=1, total=1)


@contextmanager
def _lines(name: str) -> Iterator[Advance]:
    started = last = time.monotonic()
    click.echo(f"{name}: started", err=True)

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - started) / done * (total - done)
            click.echo(f"{name}: {done}/{total}, about {left:.0f} s left", err=True)

    yield advance
    click.echo(f"{name}: done in {time.monotonic() - started:.1f} s", err=True)


def notes(texts: Iterable[str]) -> None:
    """Say what a user should know before the work begins, a line each."""
    for text in texts:
        click.echo(f"note: {text}", err=True)
