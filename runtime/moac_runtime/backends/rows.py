"""What every session tells of its rows, whatever computes them."""

from __future__ import annotations

from typing import Any


class Rows:
    """The rows of a session, which keeps `_lengths` and `_capacity`."""

    _lengths: Any  # a list of integers, or an array where a session computes with it
    _capacity: int

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(self._lengths)

    @property
    def capacity(self) -> int:
        """Tokens that each row may hold in all: N of the span rule."""
        return self._capacity

    @property
    def lengths(self) -> list[int]:
        """Tokens fed so far, per row."""
        return [int(length) for length in self._lengths]
