"""The bar of long work on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

Now = Callable[[], tuple[str, float]]


class Bar:
    """One bar over all stages: the stage's name, the share that has passed, the time left."""

    def __init__(self, progress: Progress, now: Now) -> None:
        self._progress, self._now = progress, now
        self._task = progress.add_task("", total=None, left="")

    def begin(self, name: str) -> None:
        """The stage to name."""
        self._progress.update(self._task, description=name)
        self.look(name)
        self._progress.refresh()

    def look(self, name: str) -> None:
        """Show what is left now; the bar never goes back."""
        left, share = self._now()
        known = {"total": 1.0, "completed": share} if left else {}
        if known and share < self._progress.tasks[self._task].completed:
            known.pop("completed")
        self._progress.update(self._task, left=left, **known)  # type: ignore[arg-type]

    def end(self, name: str, seconds: float) -> None:
        """Leave a line of the stage above the bar."""
        self._progress.console.print(f"{name}: done in {seconds:.1f} s", highlight=False)


@contextmanager
def shown_bar(now: Now) -> Iterator[Bar]:
    """A bar on stderr that goes when the work is over. `now()`: time left in words, and share."""
    columns = (
        TextColumn("{task.description}", table_column=Column(ratio=1)),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[left]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress, now)
