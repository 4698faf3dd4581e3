"""The rows of a session by their numbers, whatever computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from moac_runtime.backends.feeding import check_feeds, no_row
from moac_runtime.backends.session import Feed, Snapshot
from moac_runtime.errors import UsageError


class Row(Protocol):
    """What a session keeps of a row: tokens it may hold, and tokens it was fed."""

    capacity: int
    length: int


R = TypeVar("R", bound=Row)


class Rows(Generic[R]):
    """Rows by number. `origin`: what a snapshot must come from, compared with `==`."""

    def __init__(self, vocab_size: int, origin: tuple[object, ...]) -> None:
        self._by_number: dict[int, R] = {}
        self._next = 0
        self._vocab_size = vocab_size
        self._origin = origin

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows present, in the order they were admitted."""
        return tuple(self._by_number)

    def length(self, row: int) -> int:
        """Tokens fed to the row so far. Raises UsageError for a row that is not there."""
        return self._row(row).length

    def capacity(self, row: int) -> int:
        """Tokens that the row may hold in all. Raises UsageError for a row that is not there."""
        return self._row(row).capacity

    def _row(self, row: int) -> R:
        found = self._by_number.get(row)
        if found is None:
            raise no_row(row)
        return found

    def _enter(self, row: R) -> int:
        number = self._next
        self._by_number[number] = row
        self._next += 1
        return number

    def _leave(self, row: int) -> R:
        found = self._row(row)
        del self._by_number[row]
        return found

    def _check_feeds(self, feeds: Sequence[Feed]) -> list[R]:
        """The rows that are fed, each as often as there are feeds: once. Raises as `step`."""
        check_feeds(feeds, self._by_number, vocab_size=self._vocab_size)
        return [self._by_number[feed.row] for feed in feeds]

    def _check_snapshot(self, snapshot: Snapshot) -> None:
        if snapshot.origin != self._origin:
            raise UsageError(
                "the snapshot is of another model, plan or backend; restore it in a session of "
                "those it was taken under"
            )
