"""Span caches against a list that simply remembers what it was told."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moac_runtime.backends.torch.attention import decode_view, query_blocks
from moac_runtime.backends.torch.cache import SpanCache
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


def tokens(rows: range, start: int, count: int) -> Tensor:
    """Distinct contents `[rows, heads, count, DIM]` for every row, head and position."""
    row = torch.tensor(list(rows)).view(-1, 1, 1, 1) * 100_000
    position = torch.arange(start, start + count).view(1, 1, -1, 1) * 10
    head = torch.arange(HEADS).view(1, -1, 1, 1)
    return (row + position + head).expand(-1, -1, -1, DIM).float()


def put(cache: SpanCache, lengths: list[int]) -> None:
    view = decode_view(cache.layout, lengths, dtype=torch.float32)
    parts = [tokens(range(b, b + 1), n, 1)[:, :, 0] for b, n in enumerate(lengths)]
    cache.put(view.slots, torch.cat(parts), -torch.cat(parts))


def check(cache: SpanCache, rows: list[NaiveRow], names: list[int]) -> None:
    """Every slot holds what its position says, and the positions are the naive list's."""
    positions = cache.positions([row.length for row in rows])
    assert positions.shape == (len(rows), cache.layout.head.size)
    for b, row in enumerate(rows):
        filled = cache.layout.filled(b, row.length)
        assert sorted(positions[b, :filled].tolist()) == row.held()
        assert positions[b, filled:].tolist() == [-1] * (cache.layout.head.size - filled)
        keys, values, held = cache.held(slice(b, b + 1), row.length)
        assert held.tolist() == row.held()
        for slot, position in enumerate(positions[b, :filled].tolist()):
            wanted = tokens(range(names[b], names[b] + 1), position, 1)[0, :, 0]
            assert torch.equal(cache.keys[b, :, slot], wanted)
            assert torch.equal(cache.values[b, :, slot], -wanted)
        for place, position in enumerate(held.tolist()):
            wanted = tokens(range(names[b], names[b] + 1), position, 1)[0, :, 0]
            assert torch.equal(keys[0, :, place], wanted)
            assert torch.equal(values[0, :, place], -wanted)


def new_cache(head: HeadSpan, batch: int) -> SpanCache:
    return SpanCache(head, batch=batch, num_heads=HEADS, head_dim=DIM, dtype=torch.float32)


@st.composite
def heads(draw: st.DrawFn) -> HeadSpan:
    sink = draw(st.integers(0, 4))
    return HeadSpan(size=sink + draw(st.integers(1, 9)), sink=sink)


@settings(max_examples=60, deadline=None)
@given(
    heads(),
    st.lists(st.lists(st.integers(0, 14), min_size=3, max_size=3), min_size=1, max_size=6),
    st.data(),
)
def test_ragged_writes_and_growth_match_a_list(
    head: HeadSpan, steps: list[list[int]], data: st.DataObject
) -> None:
    cache, rows = new_cache(head, 3), [NaiveRow(head) for _ in range(3)]
    for counts in steps:
        if all(count == 1 for count in counts):
            put(cache, [row.length for row in rows])
        for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if count:
                k = tokens(range(b, b + 1), row.length, count)
                cache.write(slice(b, b + 1), row.length, k, -k)
                row.feed(count)
        if data.draw(st.booleans(), label="grow"):
            more = data.draw(st.integers(0, 6), label="more")
            # a head that held everything had no sinks; it gets them when it grows
            lossless = all(not row.lost and row.length <= head.size for row in rows)
            sink = head.sink or (data.draw(st.integers(0, 4)) if lossless else 0)
            head = HeadSpan(size=max(head.size + more, sink + 1), sink=sink)
            cache = cache.grown(head, [row.length for row in rows], slice(0, HEADS))
            for row in rows:
                row.grow(head)
        check(cache, rows, [0, 1, 2])


@settings(max_examples=40, deadline=None)
@given(heads(), st.lists(st.integers(0, 25), min_size=2, max_size=2), st.integers(1, 20))
def test_one_token_at_a_time_matches_a_list(head: HeadSpan, starts: list[int], count: int) -> None:
    cache, rows = new_cache(head, 2), [NaiveRow(head) for _ in range(2)]
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        k = tokens(range(b, b + 1), 0, start)
        cache.write(slice(b, b + 1), 0, k, -k)
        row.feed(start)
    for _ in range(count):
        put(cache, [row.length for row in rows])
        for row in rows:
            row.feed(1)
    check(cache, rows, [0, 1])


def test_rows_that_share_a_start_are_written_at_once() -> None:
    head = HeadSpan(size=6, sink=2)
    cache, rows = new_cache(head, 3), [NaiveRow(head) for _ in range(3)]
    for start, count in ((0, 5), (5, 9)):
        k = tokens(range(1, 3), start, count)
        cache.write(slice(1, 3), start, k, -k)
        for row in rows[1:]:
            row.feed(count)
    check(cache, rows, [0, 1, 2])


def test_growth_keeps_sinks_first_and_the_ring_oldest_first() -> None:
    cache = new_cache(HeadSpan(size=5, sink=2), 1)
    k = tokens(range(1), 0, 9)
    cache.write(slice(0, 1), 0, k, -k)
    assert cache.positions([9]).tolist() == [[0, 1, 8, 6, 7]]
    grown = cache.grown(HeadSpan(size=8, sink=2), [9], slice(0, HEADS))
    assert grown.positions([9]).tolist() == [[0, 1, 6, 7, 8, -1, -1, -1]]
    assert (grown.layout.shifts, grown.layout.gaps) == ((4,), (2,))
    assert grown.layout.slot(9 - 4) == 5


def test_a_cache_that_loses_its_sinks_still_knows_what_it_holds() -> None:
    # a sink and ring at a small capacity, the checkpoint's own window alone at a larger one
    cache = new_cache(HeadSpan(size=5, sink=2), 1)
    k = tokens(range(1), 0, 9)
    cache.write(slice(0, 1), 0, k, -k)
    head = HeadSpan(size=7, sink=0, window=7)
    grown = cache.grown(head, [9], slice(0, HEADS))
    assert grown.positions([9]).tolist() == [[0, 1, 6, 7, 8, -1, -1]]
    more = tokens(range(1), 9, 2)
    grown.write(slice(0, 1), 9, more, -more)
    assert grown.positions([11]).tolist() == [[0, 1, 6, 7, 8, 9, 10]]
    # query 11 overwrites position 0; position 1 is still there, but out of the window
    view = decode_view(grown.layout, [11], dtype=torch.float32)
    assert view.slots == 0
    assert view.mask is not None
    assert view.mask.flatten().isinf().tolist() == [False, True] + [False] * 5


def test_growth_of_some_heads_takes_those_alone() -> None:
    cache = new_cache(HeadSpan(size=4, sink=0), 1)
    k = tokens(range(1), 0, 3)
    cache.write(slice(0, 1), 0, k, -k)
    part = cache.grown(HeadSpan(size=6, sink=1), [3], slice(1, 2))
    assert part.keys.shape == (1, 1, 6, DIM)
    assert torch.equal(part.keys[:, :, :3], k[:, 1:])


def test_kept_rows_take_their_tokens_and_free_the_rest() -> None:
    head = HeadSpan(size=5, sink=1)
    cache, rows = new_cache(head, 3), [NaiveRow(head) for _ in range(3)]
    for b, row in enumerate(rows):
        k = tokens(range(b, b + 1), 0, 4 + 3 * b)
        cache.write(slice(b, b + 1), 0, k, -k)
        row.feed(4 + 3 * b)
    whole = cache.bytes
    cache.keep([2, 0])
    assert cache.bytes * 3 == whole * 2
    check(cache, [rows[2], rows[0]], [2, 0])


def test_bytes_are_those_of_the_span() -> None:
    cache = SpanCache(
        HeadSpan(size=7, sink=2), batch=2, num_heads=3, head_dim=16, dtype=torch.bfloat16
    )
    assert cache.bytes == 2 * 3 * 7 * (2 * 16 * 2)


@pytest.mark.parametrize("window", [None, 7, 200])
@pytest.mark.parametrize("start", [0, 50, 300])
def test_query_blocks_hold_every_key_in_sight_and_few_others(
    start: int, window: int | None
) -> None:
    head = HeadSpan(size=min(40, window or 40), sink=8 if window != 7 else 0, window=window)
    cache = new_cache(head, 1)
    held = cache.layout.positions(0, cache.layout.kept(0, start)).tolist()
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
    cache = SpanCache(HeadSpan(8, 2), batch=1, num_heads=1, head_dim=1, dtype=torch.float32)
    lengths = [0]

    def feed(count: int) -> None:
        fed = torch.arange(lengths[0], lengths[0] + count).float().view(1, 1, count, 1)
        cache.write(slice(0, 1), lengths[0], fed, fed)
        lengths[0] += count

    def check() -> None:
        positions = cache.positions(lengths)[0]
        held = positions >= 0
        assert held.any()
        torch.testing.assert_close(cache.keys[0, 0, held, 0], positions[held].float())

    feed(30)
    for size, more in ((12, 5), (16, 3), (20, 9)):
        cache = cache.grown(HeadSpan(size, 0, window=size), lengths, slice(0, 1))
        check()
        feed(more)
        check()
