"""The KV cache of a group of heads with one span: `[sinks | ring]`, exactly `size` slots.

A token is stored once, rotated at its own position, and never moved. Attention does not care in
which order keys stand, so the ring is read as it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moac_runtime.package.span import HeadSpan


@dataclass(frozen=True, slots=True)
class Layout:
    """Which slot holds which position, for every row of a batch.

    A row's tokens have *places*: their positions, numbered without the tokens that were lost
    when the cache grew. `shifts[row]`: how many were lost; `gaps[row]`: the first position of
    them. So place `p` is position `p` below the gap and `p + shift` from there on, slots fill in
    order of places, and the filled slots are always the first ones.
    """

    head: HeadSpan
    shifts: tuple[int, ...]
    gaps: tuple[int, ...]

    @property
    def ring(self) -> int:
        """Slots that are overwritten, oldest first."""
        return self.head.size - self.head.sink

    def filled(self, row: int, length: int) -> int:
        """Slots in use when `row` has been fed `length` tokens."""
        return min(length - self.shifts[row], self.head.size)

    def slot(self, place: int) -> int:
        """The slot of one place."""
        sink = self.head.sink
        return place if place < sink else sink + (place - sink) % self.ring

    def slots(self, places: Tensor) -> Tensor:
        """The slots of places, elementwise."""
        sink = self.head.sink
        return torch.where(places < sink, places, sink + (places - sink) % self.ring)

    def kept(self, first: int, stop: int) -> Tensor:
        """Of the places `first` to `stop - 1`, those still held after all were written, sorted."""
        sink = self.head.sink
        pinned = torch.arange(first, max(first, min(stop, sink)))
        recent = torch.arange(max(first, sink, stop - self.ring), max(stop, first, sink))
        return torch.cat([pinned, recent])

    def positions(self, row: int, places: Tensor) -> Tensor:
        """The positions of places of `row`, elementwise."""
        return torch.where(places < self.gaps[row], places, places + self.shifts[row])

    def beginning(self, row: int, places: Tensor) -> int:
        """Index of the first of `places` that a cache of one gap can keep, with all after it.

        Where the first token of all is gone, what is left before the gap goes too: it is older
        than everything else, and nothing would tell its distance.
        """
        if not len(places) or int(places[0]) == 0 or int(places[0]) >= self.gaps[row]:
            return 0
        return int((places < self.gaps[row]).sum())

    def slot_positions(self, lengths: Sequence[int]) -> Tensor:
        """The position in each slot, `[B, size]`, -1 where empty, after `lengths` tokens."""
        slot, sink = torch.arange(self.head.size), self.head.sink
        shift = torch.tensor(self.shifts)[:, None]
        last = torch.tensor(lengths)[:, None] - shift - 1
        in_ring = last - (last - slot) % self.ring
        place = torch.where(slot < sink, slot, in_ring)
        empty = (place > last) | (place < torch.where(slot < sink, 0, sink))
        position = torch.where(place < torch.tensor(self.gaps)[:, None], place, place + shift)
        return position.masked_fill(empty, -1)

    def grown(self, head: HeadSpan, lengths: Sequence[int]) -> tuple[Layout, list[Tensor]]:
        """The layout under a larger span `head`, and each row's old slots in their new order.

        `lengths`: tokens fed to each row. Sinks come first, the ring's tokens follow, oldest
        first; what was dropped stays dropped.
        """
        unbroken = Layout(head, (0,) * len(lengths), (0,) * len(lengths))
        shifts, gaps, moved = [], [], []
        for row, length in enumerate(lengths):
            places = self.kept(0, length - self.shifts[row])
            places = places[unbroken.kept(0, len(places))]
            places = places[self.beginning(row, places) :]
            count, positions = len(places), self.positions(row, places)
            shifts.append(length - count)
            gaps.append(int((positions == torch.arange(count)).sum()) if length > count else 0)
            moved.append(self.slots(places))
        return Layout(head, tuple(shifts), tuple(gaps)), moved

    def rows(self, rows: Sequence[int]) -> Layout:
        """The layout of these rows alone."""
        shifts = tuple(self.shifts[row] for row in rows)
        return Layout(self.head, shifts, tuple(self.gaps[row] for row in rows))


class SpanCache:
    """Keys and values `[B, heads, size, D]` of adjacent KV heads that share one span."""

    __slots__ = ("keys", "layout", "values")

    def __init__(
        self,
        head: HeadSpan,
        *,
        batch: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, num_heads, head.size, head_dim)
        # zeros, not empty: a slot under a mask weighs nothing, but NaN times nothing is NaN
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.layout = Layout(head, (0,) * batch, (0,) * batch)

    @property
    def bytes(self) -> int:
        """Bytes of storage behind the keys and values."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def positions(self, lengths: Sequence[int]) -> Tensor:
        """The position in each slot, `[B, size]`, -1 where empty."""
        return self.layout.slot_positions(lengths)

    def write(self, rows: slice, start: int, k: Tensor, v: Tensor) -> None:
        """Store `k`, `v` `[rows, heads, T, D]` of positions `start` onward.

        The rows must share `start`, and their shifts. What falls out of the span on the way is
        never written.
        """
        first = start - self.layout.shifts[rows.start]
        places = self.layout.kept(first, first + k.shape[2])
        slots = self.layout.slots(places).to(k.device)
        source = (places - first).to(k.device)
        self.keys[rows].index_copy_(2, slots, k.index_select(2, source))
        self.values[rows].index_copy_(2, slots, v.index_select(2, source))

    def put(self, slots: int | Tensor, k: Tensor, v: Tensor) -> None:
        """Store one token a row, `k` and `v` `[B, heads, D]`, at one slot or at `slots` `[B]`."""
        if isinstance(slots, int):
            self.keys[:, :, slots].copy_(k)
            self.values[:, :, slots].copy_(v)
        else:
            row = torch.arange(len(slots), device=slots.device)
            self.keys[row, :, slots] = k
            self.values[row, :, slots] = v

    def held(self, rows: slice, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values `[rows, heads, n, D]` held after `length` tokens, oldest first.

        Third: their positions `[n]`, ascending. The rows must share `length`, and their shifts.
        """
        first = rows.start
        places = self.layout.kept(0, length - self.layout.shifts[first])
        slots = self.layout.slots(places).to(self.keys.device)
        keys = self.keys[rows].index_select(2, slots)
        values = self.values[rows].index_select(2, slots)
        return keys, values, self.layout.positions(first, places)

    def grown(self, head: HeadSpan, lengths: Sequence[int], heads: slice) -> SpanCache:
        """A cache of span `head` for some of the heads, holding what this one holds of them."""
        batch, _, _, head_dim = self.keys.shape
        keys, values = self.keys[:, heads], self.values[:, heads]
        new = SpanCache(
            head,
            batch=batch,
            num_heads=keys.shape[1],
            head_dim=head_dim,
            dtype=keys.dtype,
            device=keys.device,
        )
        new.layout, moved = self.layout.grown(head, lengths)
        for row, slots in enumerate(moved):
            source = slots.to(keys.device)
            new.keys[row, :, : len(slots)] = keys[row].index_select(1, source)
            new.values[row, :, : len(slots)] = values[row].index_select(1, source)
        return new

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in this order; the others' memory is freed."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys = self.keys.index_select(0, index)
        self.values = self.values.index_select(0, index)
        self.layout = self.layout.rows(rows)
