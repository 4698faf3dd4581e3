"""What the cache of one span holds, as numbers: `cache.Layout` for the native kernels.

The bytes lie in the session's memory; the kernels fill slots by the same rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moac_runtime.package.span import HeadSpan


@dataclass(slots=True)
class CpuCache:
    """Adjacent KV heads `heads` of a layer that share a span; `offset` of their memory, in bytes.

    A row's tokens have places: their positions without the `shifts[row]` that were lost, from
    position `gaps[row]` on, when the cache grew (see `cache.Layout`).
    """

    head: HeadSpan
    heads: slice
    shifts: tuple[int, ...]
    gaps: tuple[int, ...]
    offset: int = 0

    @property
    def num_heads(self) -> int:
        """KV heads that share the cache."""
        return int(self.heads.stop) - int(self.heads.start)

    @property
    def slots(self) -> int:
        """Keys that one row holds, all heads together."""
        return self.num_heads * self.head.size

    def rows(self, rows: Sequence[int]) -> CpuCache:
        """The cache of these rows alone."""
        shifts = tuple(self.shifts[row] for row in rows)
        return CpuCache(self.head, self.heads, shifts, tuple(self.gaps[row] for row in rows))

    def slot(self, place: int) -> int:
        """The slot of one place."""
        sink = self.head.sink
        return place if place < sink else sink + (place - sink) % (self.head.size - sink)

    def slot_runs(self, places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Index of the first, slot and count of runs of `places` that lie side by side."""
        first = 0
        for index in range(1, len(places) + 1):
            before = self.slot(places[index - 1])
            if index == len(places) or self.slot(places[index]) != before + 1:
                yield first, self.slot(places[first]), index - first
                first = index

    def grown(
        self, head: HeadSpan, heads: slice, lengths: Sequence[int]
    ) -> tuple[CpuCache, list[list[int]]]:
        """The cache of span `head` that follows, and the places of each row that move into it.

        What was dropped stays dropped. Sinks come first, the ring's tokens follow, oldest first.
        """
        kept = [self._kept(row, length, head) for row, length in enumerate(lengths)]
        shifts = tuple(length - len(own) for length, own in zip(lengths, kept, strict=True))
        gaps = tuple(self._prefix(row, own) if shifts[row] else 0 for row, own in enumerate(kept))
        return CpuCache(head, heads, shifts, gaps), kept

    def _kept(self, row: int, length: int, head: HeadSpan) -> list[int]:
        held = _held(length - self.shifts[row], self.head)
        places = [held[index] for index in _held(len(held), head)]
        # Where the first token of all is gone, what is left before the gap goes too: it is older
        # than everything else, and nothing would tell its distance.
        if places and places[0] != 0 and places[0] < self.gaps[row]:
            return [place for place in places if place >= self.gaps[row]]
        return places

    def _prefix(self, row: int, places: Sequence[int]) -> int:
        """How many of the places still stand at their own position, counted from the first."""
        gap, shift = self.gaps[row], self.shifts[row]
        return sum(
            (place if place < gap else place + shift) == index
            for index, place in enumerate(places)
        )


def _held(count: int, head: HeadSpan) -> list[int]:
    """Of the places up to `count`, those that a span holds after all were written, sorted."""
    recent = max(head.sink, count - (head.size - head.sink))
    return [*range(min(count, head.sink)), *range(recent, count)]
