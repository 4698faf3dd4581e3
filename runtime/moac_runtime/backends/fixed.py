"""Rows of a backend whose batch is fixed: all there before the first step, all at one capacity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from moac_runtime.backends.feeding import check_sizes
from moac_runtime.backends.rows import Rows
from moac_runtime.backends.session import Snapshot
from moac_runtime.errors import UsageError


@dataclass(slots=True)
class FixedRow:
    """One row. `place`: which row of the batch's memory it is, from the first step on.

    `content`: what a restored row holds, until then.
    """

    capacity: int
    length: int = 0
    content: Any = None
    place: int = 0


class FixedRows(Rows[FixedRow], ABC):
    """Admission to a fixed batch, which begins with its first step and ends with its last row."""

    fixed_batch = True

    def __init__(self, vocab_size: int, origin: tuple[object, ...]) -> None:
        super().__init__(vocab_size, origin)
        self._begun = False

    def admit(self, capacity: int) -> int:
        """A new row, before the batch's first step and at the capacity of its other rows.

        Raises UsageError for another one, and MoacError where memory does not suffice.
        """
        check_sizes(capacity=capacity)
        return self._join(FixedRow(capacity))

    def restore(self, snapshot: Snapshot) -> int:
        """A new row from a copy; see `admit`. Raises UsageError for a copy of something else."""
        self._check_snapshot(snapshot)
        return self._join(FixedRow(snapshot.capacity, snapshot.length, snapshot.content))

    def release(self, row: int) -> None:
        """Let a row go; with the last one, all memory. Raises UsageError for one not there."""
        left = self._leave(row)
        if not self._begun:
            return
        if self._by_number:
            self._row_left(left)
        else:
            self._begun = False
            self._end()

    def _begin_once(self) -> None:
        """Begin the batch with the rows that are there, unless it has begun."""
        if self._begun:
            return
        present = list(self._by_number.values())
        for place, row in enumerate(present):
            row.place = place
        self._begin(present)
        self._begun = True
        for row in present:
            row.content = None

    def _join(self, row: FixedRow) -> int:
        if self._begun:
            raise UsageError(
                "the batch has begun, and this backend takes no row after the first step; admit "
                "all rows before it, or wait until the last has left"
            )
        others = next(iter(self._by_number.values()), None)
        if others is not None and others.capacity != row.capacity:
            raise UsageError(
                f"a row of {row.capacity} tokens cannot join a batch of rows of "
                f"{others.capacity}; this backend runs all of them at one capacity"
            )
        self._check_batch(len(self._by_number) + 1, row.capacity)
        return self._enter(row)

    @abstractmethod
    def _check_batch(self, batch: int, capacity: int) -> None:
        """Raises where so many rows of so many tokens cannot run."""

    @abstractmethod
    def _begin(self, rows: list[FixedRow]) -> None:
        """Allocate memory for these rows, and put the contents of restored ones in it."""

    @abstractmethod
    def _row_left(self, row: FixedRow) -> None:
        """Go on without a row; others remain."""

    @abstractmethod
    def _end(self) -> None:
        """Free all memory: no row is left."""
