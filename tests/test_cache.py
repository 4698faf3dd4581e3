"""Span caches against a list that simply remembers what it was told."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moac_runtime.backends.layout import HeadRun, Layout, grown_runs, head_runs
from moac_runtime.backends.torch.attention import decode_view, query_blocks, slot_positions
from moac_runtime.backends.torch.cache import SpanCache
from moac_runtime.backends.torch.rounding import format_of
from moac_runtime.package.span import HeadSpan, visible

HEADS, DIM = 2, 3


@dataclass
class NaiveRow:
    """Positions held, found by asking for each token fed whether the span still wants it."""

    head: HeadSpan
    length: int = 0
    lost: set[int] = field(default_factory=set)

    def feed(self, count: int) -> None:
        self.length += count
        self.lost |= set(range(self.length)) - set(self.held())

    def held(self) -> list[int]:
        """Sinks, and of the others that are not lost the last ones that the ring has room for."""
        here = [p for p in range(self.length) if p not in self.lost]
        others = here[self.head.sink :]
        return here[: self.head.sink] + others[-(self.head.size - self.head.sink) :]

    def grow(self, head: HeadSpan) -> None:
        self.head = head


def tokens(start: int, count: int) -> Tensor:
    """Distinct contents `[heads, count, DIM]` for every head and position."""
    position = torch.arange(start, start + count).view(1, -1, 1) * 10
    head = torch.arange(HEADS).view(-1, 1, 1)
    return (position + head).expand(-1, -1, DIM).float()


def put(cache: SpanCache, length: int) -> None:
    view = decode_view(cache.run.layout, length, dtype=torch.float32)
    k = tokens(length, 1)[:, 0]
    cache.put(view.slot, k, -k)


def write(cache: SpanCache, start: int, count: int) -> None:
    k = tokens(start, count)
    cache.write(start, (k,), (-k,))


def positions(cache: SpanCache, length: int) -> list[int]:
    """The position in each slot, -1 where empty."""
    layout = cache.run.layout
    return slot_positions(layout.held(length), layout.head.size).tolist()


def grown(cache: SpanCache, head: HeadSpan, length: int, heads: slice | None = None) -> SpanCache:
    layout, moved = cache.run.layout.grown(head, length)
    part = heads or slice(0, HEADS)
    return cache.grown(HeadRun(part.start, part.stop, layout), moved)


def check(cache: SpanCache, row: NaiveRow) -> None:
    """Every slot holds what its position says, and the positions are the naive list's."""
    layout = cache.run.layout
    filled, found = layout.filled(row.length), positions(cache, row.length)
    assert sorted(found[:filled]) == row.held()
    assert found[filled:] == [-1] * (layout.head.size - filled)
    (keys,), (values,), held = cache.held(row.length)
    assert held == row.held()
    for place, (slot, position) in enumerate(zip(map(found.index, held), held, strict=True)):
        wanted = tokens(position, 1)[:, 0]
        assert torch.equal(cache.keys[0][:, slot], wanted)
        assert torch.equal(cache.values[0][:, slot], -wanted)
        assert torch.equal(keys[:, place], wanted)
        assert torch.equal(values[:, place], -wanted)


def new_cache(head: HeadSpan) -> SpanCache:
    return SpanCache(HeadRun(0, HEADS, Layout(head)), format_of(DIM, torch.float32, head.bits))


@st.composite
def heads(draw: st.DrawFn) -> HeadSpan:
    sink = draw(st.integers(0, 4))
    return HeadSpan(size=sink + draw(st.integers(1, 9)), sink=sink)


@settings(max_examples=180, deadline=None)
@given(heads(), st.lists(st.integers(0, 14), min_size=1, max_size=6), st.data())
def test_writes_and_growth_match_a_list(
    head: HeadSpan, counts: list[int], data: st.DataObject
) -> None:
    cache, row = new_cache(head), NaiveRow(head)
    for count in counts:
        if count == 1:
            put(cache, row.length)
        elif count:
            write(cache, row.length, count)
        row.feed(count)
        if data.draw(st.booleans(), label="grow"):
            more = data.draw(st.integers(0, 6), label="more")
            # a head that held everything had no sinks; it gets them when it grows
            lossless = not row.lost and row.length <= head.size
            sink = head.sink or (data.draw(st.integers(0, 4)) if lossless else 0)
            head = HeadSpan(size=max(head.size + more, sink + 1), sink=sink)
            cache = grown(cache, head, row.length)
            row.grow(head)
        check(cache, row)


@settings(max_examples=80, deadline=None)
@given(heads(), st.integers(0, 25), st.integers(1, 20))
def test_one_token_at_a_time_matches_a_list(head: HeadSpan, start: int, count: int) -> None:
    cache, row = new_cache(head), NaiveRow(head)
    write(cache, 0, start)
    row.feed(start)
    for _ in range(count):
        put(cache, row.length)
        row.feed(1)
    check(cache, row)


def test_growth_keeps_sinks_first_and_the_ring_oldest_first() -> None:
    cache = new_cache(HeadSpan(size=5, sink=2))
    write(cache, 0, 9)
    assert positions(cache, 9) == [0, 1, 8, 6, 7]
    larger = grown(cache, HeadSpan(size=8, sink=2), 9)
    assert positions(larger, 9) == [0, 1, 6, 7, 8, -1, -1, -1]
    assert larger.run.layout == Layout(HeadSpan(size=8, sink=2), shift=4, gap=2)
    assert larger.run.layout.next_slot(9) == 5


def test_a_cache_that_loses_its_sinks_still_knows_what_it_holds() -> None:
    # a sink and ring at a small capacity, the checkpoint's own window alone at a larger one
    cache = new_cache(HeadSpan(size=5, sink=2))
    write(cache, 0, 9)
    larger = grown(cache, HeadSpan(size=7, sink=0, window=7), 9)
    assert positions(larger, 9) == [0, 1, 6, 7, 8, -1, -1]
    write(larger, 9, 2)
    assert positions(larger, 11) == [0, 1, 6, 7, 8, 9, 10]
    # query 11 overwrites position 0; position 1 is still there, but out of the window
    view = decode_view(larger.run.layout, 11, dtype=torch.float32)
    assert view.slot == 0
    assert view.mask is not None
    assert view.mask.flatten().isinf().tolist() == [False, True] + [False] * 5


def test_growth_of_some_heads_takes_those_alone() -> None:
    cache = new_cache(HeadSpan(size=4, sink=0))
    write(cache, 0, 3)
    part = grown(cache, HeadSpan(size=6, sink=1), 3, slice(1, 2))
    (keys,) = part.keys
    assert keys.shape == (1, 6, DIM)
    assert torch.equal(keys[:, :3], tokens(0, 3)[1:])


def test_bytes_are_those_of_the_span() -> None:
    run = HeadRun(2, 5, Layout(HeadSpan(size=7, sink=2)))
    cache = SpanCache(run, format_of(16, torch.bfloat16, None))
    assert cache.bytes == 3 * 7 * (2 * 16 * 2)


WIDE, NARROW, DENSE = HeadSpan(24, 4), HeadSpan(16, 4), HeadSpan(64, 0)


def test_adjacent_heads_of_one_span_are_a_run_and_part_when_they_grow_apart() -> None:
    runs = head_runs([NARROW, NARROW, WIDE, NARROW])
    assert [(run.first, run.stop, run.layout.head.size) for run in runs] == [
        (0, 2, 16),
        (2, 3, 24),
        (3, 4, 16),
    ]
    # heads 1 and 2 get equal spans, but hold different tokens
    found = grown_runs(runs, [WIDE, DENSE, DENSE, DENSE], 30)
    assert [(run.first, run.stop, run.layout.head, source) for run, source, _ in found] == [
        (0, 1, WIDE, 0),
        (1, 2, DENSE, 0),
        (2, 3, DENSE, 1),
        (3, 4, DENSE, 2),
    ]
    assert [run.layout.shift for run, _, _ in found] == [14, 14, 6, 14]
    assert sum(run.num_heads * run.layout.head.size for run, _, _ in found) == 24 + 3 * 64


@pytest.mark.parametrize("window", [None, 7, 200])
@pytest.mark.parametrize("start", [0, 50, 300])
def test_query_blocks_hold_every_key_in_sight_and_few_others(
    start: int, window: int | None
) -> None:
    head = HeadSpan(size=min(40, window or 40), sink=8 if window != 7 else 0, window=window)
    held = new_cache(head).held(start)[2]
    keys = held + list(range(start, start + 300))
    blocks = query_blocks(head, start, 300, keys, dtype=torch.float32)
    queries = []
    for block in blocks:
        seen_keys = [key for part in block.keys for key in keys[part]]
        for index in range(block.queries.start, block.queries.stop):
            wanted = [key for key in keys if visible(start + index, key, head)]
            row = None if block.mask is None else block.mask[index - block.queries.start]
            seen = [k for n, k in enumerate(seen_keys) if row is None or row[n] == 0]
            assert seen == wanted
            queries.append(index)
        assert len(seen_keys) <= 128 + head.size
    assert queries == list(range(300))


def test_growing_twice_never_misplaces_a_token() -> None:
    """Sinks half pushed out of a pure ring before the second growth: positions stay true."""
    cache, length = new_cache(HeadSpan(8, 2)), 0

    def feed(count: int) -> None:
        nonlocal length
        write(cache, length, count)
        length += count

    def check() -> None:
        found = positions(cache, length)
        held = [(slot, position) for slot, position in enumerate(found) if position >= 0]
        assert held
        for slot, position in held:
            assert torch.equal(cache.keys[0][:, slot], tokens(position, 1)[:, 0])

    feed(30)
    for size, more in ((12, 5), (16, 3), (20, 9)):
        cache = grown(cache, HeadSpan(size, 0, window=size), length)
        check()
        feed(more)
        check()
