"""Where a row's tokens lie: runs of heads, `[sinks | ring]`, what growth keeps, RoPE frequencies.

Plain Python that every backend computes with. A token is stored once, rotated at its own position,
and never moved but by growth. Attention does not care in which order keys stand, so a ring is read
as it lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import HeadSpan
from moac_runtime.package.spec import RopeSpec


class Stretch(NamedTuple):
    """`size` tokens side by side, in slots from `slot` on and at positions from `position` on."""

    position: int
    slot: int
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Which slot of a span of one row holds which position.

    The row's tokens have *places*: their positions, numbered without the `shift` tokens that were
    lost, from position `gap` on, when the row grew. So place `p` is position `p` below the gap and
    `p + shift` from there on, slots fill in order of places, and the filled slots are always the
    first ones.
    """

    head: HeadSpan
    shift: int = 0
    gap: int = 0

    @property
    def ring(self) -> int:
        """Slots that are overwritten, oldest first."""
        return self.head.size - self.head.sink

    def filled(self, length: int) -> int:
        """Slots in use when the row has been fed `length` tokens."""
        return min(length - self.shift, self.head.size)

    def next_slot(self, length: int) -> int:
        """The slot of the token that follows `length` others."""
        return self._slot(length - self.shift)

    def held(self, length: int) -> list[Stretch]:
        """What is held of `length` tokens fed, oldest first."""
        return list(self._stretches(self._places(length - self.shift)))

    def written(self, start: int, count: int) -> list[Stretch]:
        """Of the tokens at positions `start` to `start + count - 1`, fed at once, those to store.

        The others fall out of the span on the way.
        """
        first = start - self.shift
        places = (range(max(part.start, first), part.stop) for part in self._places(first + count))
        return list(self._stretches(places))

    def grown(self, head: HeadSpan, length: int) -> tuple[Layout, list[Stretch]]:
        """The layout under a larger span after `length` tokens, and what moves into it.

        What moves fills the new slots from the first on, in this order. What was dropped stays
        dropped.
        """
        held = self._places(length - self.shift)
        count = sum(map(len, held))
        kept = [part for run in Layout(head)._places(count) for part in _part(held, run)]
        # Where the first token of all is gone, what is left before the gap goes too: it is older
        # than everything else, and nothing would tell its distance.
        if kept and 0 < kept[0].start < self.gap:
            kept = [range(max(part.start, self.gap), part.stop) for part in kept]
        moved = list(self._stretches(kept))
        shift = length - sum(stretch.size for stretch in moved)
        return Layout(head, shift, _prefix(moved) if shift else 0), moved

    def _slot(self, place: int) -> int:
        sink = self.head.sink
        return place if place < sink else sink + (place - sink) % self.ring

    def _places(self, count: int) -> list[range]:
        """The places that are held of `count`, ascending."""
        if count <= self.head.size:
            return [range(count)]
        return [range(self.head.sink), range(count - self.ring, count)]

    def _stretches(self, places: Iterable[range]) -> Iterator[Stretch]:
        for part in places:
            first = part.start
            while first < part.stop:
                slot = self._slot(first)
                stop = min(part.stop, first + self.head.size - slot)
                if first < self.gap:
                    stop = min(stop, self.gap)
                lost = 0 if first < self.gap else self.shift
                yield Stretch(first + lost, slot, stop - first)
                first = stop


class RunMemory(NamedTuple):
    """A run's memory, in bytes: the keys' codes of all its heads, the keys' scales, then those of
    the values; each head's codes are `codes` bytes from the next one's, its scales `scales`.

    Codes of a head are `size` slots of `KvShape.code_bytes` each, its scales of `scale_bytes`.
    Unrounded heads have no scales, and their numbers as they are for codes.
    """

    keys: int
    key_scales: int
    values: int
    value_scales: int
    size: int
    codes: int
    scales: int


@dataclass(frozen=True, slots=True)
class HeadRun:
    """Adjacent KV heads of a layer, `first` to `stop - 1` in packed order, that share a layout."""

    first: int
    stop: int
    layout: Layout

    @property
    def num_heads(self) -> int:
        """KV heads of the run."""
        return self.stop - self.first

    def memory(self, kv: KvShape) -> RunMemory:
        """Where keys and values lie in the run's memory."""
        head = self.layout.head
        codes, scales = kv.codes(head.size, head.bits), kv.scales(head.size, head.bits)
        values = self.num_heads * (codes + scales)
        return RunMemory(
            keys=0,
            key_scales=self.num_heads * codes,
            values=values,
            value_scales=values + self.num_heads * codes,
            size=2 * values,
            codes=codes,
            scales=scales,
        )


class Growth(NamedTuple):
    """A run of a row that grew: which of the layer's runs it comes from, and what it keeps."""

    run: HeadRun
    source: int
    moved: list[Stretch]


def packed_spans(
    plan: Plan, head_order: Sequence[Sequence[int]], capacity: int
) -> list[list[HeadSpan]]:
    """The spans of all KV heads `[layers][kv_heads]` in packed order.

    `head_order[layer][position]`: the checkpoint's KV head packed at that position.
    """
    return [
        [plan.head(layer, head, capacity) for head in order]
        for layer, order in enumerate(head_order)
    ]


def head_runs(heads: Sequence[HeadSpan]) -> list[HeadRun]:
    """A layer's heads as runs of adjacent ones with equal spans, which hold nothing yet."""
    runs: list[HeadRun] = []
    for head, same in groupby(heads):
        first = runs[-1].stop if runs else 0
        runs.append(HeadRun(first, first + len(list(same)), Layout(head)))
    return runs


def grown_runs(runs: Sequence[HeadRun], heads: Sequence[HeadSpan], length: int) -> list[Growth]:
    """A layer's runs under larger spans, after `length` tokens.

    Heads that shared a span may part. They never join: they may hold different tokens.
    """
    found = []
    for new in head_runs(heads):
        for source, old in enumerate(runs):
            first, stop = max(new.first, old.first), min(new.stop, old.stop)
            if first < stop:
                layout, moved = old.layout.grown(new.layout.head, length)
                found.append(Growth(HeadRun(first, stop, layout), source, moved))
    return found


def rope_tables(ropes: Sequence[RopeSpec], head_dim: int, capacity: int) -> list[list[float]]:
    """The frequencies `[tables, head_dim / 2]` of a row of `capacity` tokens."""
    return [rope_frequencies(rope, head_dim, capacity) for rope in ropes]


def rope_frequencies(rope: RopeSpec, head_dim: int, capacity: int) -> list[float]:
    """The frequencies `[head_dim / 2]` of one rotary table for a row of `capacity` tokens.

    They stay the same from the first token to the last, so that prefill and decode agree. Of
    the kinds of RoPE, `dynamic` and `longrope` alone depend on the capacity. Numbers of a head
    that do not rotate come last in each half (`packaging/fuse.py`) and have the frequency nought.
    """
    rotated = rope.rotated or head_dim
    still = [0.0] * ((head_dim - rotated) // 2)
    context = rope.original_context
    if context is None or capacity <= context:
        return [*rope.inv_freq, *still]
    if rope.kind == "longrope":
        return [*rope.long_inv_freq, *still]
    stretch = rope.factor * capacity / context - (rope.factor - 1)
    theta = rope.theta * stretch ** (rotated / (rotated - 2))
    return [*(theta ** (-2 * i / rotated) for i in range(rotated // 2)), *still]


def rope_scalings(rope: RopeSpec, head_dim: int) -> list[float]:
    """The factors `[head_dim / 2]` on cos and sin: 1 for numbers that do not rotate."""
    rotated = (rope.rotated or head_dim) // 2
    return [rope.scaling] * rotated + [1.0] * (head_dim // 2 - rotated)


def _part(places: Iterable[range], indices: range) -> Iterator[range]:
    """Of `places`, numbered on from range to range, those numbered by `indices`."""
    first, stop = indices.start, indices.stop
    for part in places:
        if found := part[max(first, 0) : max(stop, 0)]:
            yield found
        first, stop = first - len(part), stop - len(part)


def _prefix(stretches: Iterable[Stretch]) -> int:
    """How many tokens stand at their own position, counted from the first."""
    count = 0
    for stretch in stretches:
        if stretch.position != count:
            break
        count += stretch.size
    return count
