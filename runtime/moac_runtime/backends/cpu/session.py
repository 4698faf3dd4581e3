"""A session on the native CPU kernels: the interface of `session.Session` without torch.

All keys and values of a session lie in one piece of memory of exactly the planned size. A step is
one native call for every row at once, whether a row adds one token or many.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby, pairwise
from typing import Any

from moac_runtime.backends.arrays import Array
from moac_runtime.backends.cpu.cache import CpuCache
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.library import CacheStruct, SegmentStruct, StepStruct, integers
from moac_runtime.backends.cpu.weights import address_of
from moac_runtime.backends.feeding import (
    check_growth,
    check_kept,
    check_room,
    check_sizes,
    check_step,
    check_tokens,
)
from moac_runtime.backends.rows import Rows
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import HeadSpan
from moac_runtime.package.spec import RopeSpec

# Tokens of a step: enough that reading and packing weights costs little beside computing.
CHUNK = 512


class CpuSession(Rows):
    """`batch` sequences of at most `capacity` tokens each (prompt and tokens to come).

    `head_order[layer][position]`: the checkpoint's KV head packed at that position, which finds
    a head's rule in `plan`. `chunk`: tokens of prefill that share a step, all rows together.
    Raises UsageError for a batch, capacity or chunk below one.
    """

    def __init__(
        self,
        engine: CpuEngine,
        plan: Plan,
        head_order: Sequence[Sequence[int]],
        *,
        batch: int,
        capacity: int,
        chunk: int = CHUNK,
    ) -> None:
        check_sizes(batch=batch, capacity=capacity, chunk=chunk)
        self._engine = engine
        self._plan = plan
        self._head_order = head_order
        self._chunk = chunk
        self._capacity = capacity
        self._lengths = [0] * batch
        self._frequencies = self._tables(capacity)
        nothing = (0,) * batch
        self._lay_out(
            [
                [CpuCache(head, heads, nothing, nothing) for head, heads in self._runs(layer)]
                for layer in range(engine.spec.num_layers)
            ]
        )

    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, all layers, heads and rows."""
        return sum(self._bytes(cache) for layer in self._layers for cache in layer)

    def extend(self, tokens: Sequence[Sequence[int]]) -> Array:
        """Feed each row its `tokens`; float32 logits `[B, V]` after the last token of each row.

        Rows may differ in number and may get none (their logits are NaN). Raises UsageError for
        tokens that are none, MoacError where a row would pass the capacity; nothing is fed then.
        """
        wanted = [[len(row) - 1] if row else [] for row in tokens]
        self._check(tokens, wanted)
        logits = _empty(self.batch, self._engine.spec.vocab_size)
        for row, fed in enumerate(tokens):
            if not fed:
                logits[row] = math.nan
        self._feed(tokens, wanted, list(range(self.batch)), logits)
        return logits

    def extend_all(self, tokens: Sequence[Sequence[int]]) -> list[Array]:
        """Feed each row its `tokens`; float32 logits `[T_b, V]` after each of them, per row."""
        return self.extend_at(tokens, [range(len(row)) for row in tokens])

    def extend_at(
        self, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> list[Array]:
        """Feed each row its `tokens`; float32 logits `[len(wanted[b]), V]` per row.

        `wanted[b]`: ascending indices into `tokens[b]`. Raises as `extend` does.
        """
        self._check(tokens, wanted)
        ends = [0]
        for chosen in wanted:
            ends.append(ends[-1] + len(chosen))
        logits = _empty(ends[-1], self._engine.spec.vocab_size)
        self._feed(tokens, wanted, ends[:-1], logits)
        return [logits[first:stop] for first, stop in pairwise(ends)]

    def decode(self, tokens: Array | Sequence[int]) -> Array:
        """Feed each row one token, `[B]`; float32 logits `[B, V]`. Raises as `extend`."""
        fed: list[int] = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
        check_step((len(fed),), self.batch)
        return self.extend([[token] for token in fed])

    def grow(self, capacity: int) -> None:
        """Move to a larger capacity: every head gets its span there and keeps what it holds.

        Tokens dropped before stay dropped. With `dynamic` RoPE new tokens are rotated by the
        larger capacity's frequencies, and the keys already stored stay as they were rotated, as
        in transformers. Raises UsageError for a capacity that is not larger.
        """
        check_growth(self._capacity, capacity)
        self._capacity = capacity
        self._frequencies = self._tables(capacity)
        before, arena, base = self._layers, self._arena, self._base
        kept = [list(self._grown(layer, caches)) for layer, caches in enumerate(before)]
        self._lay_out([[new for new, _, _ in caches] for caches in kept])
        for new, old, places in (entry for caches in kept for entry in caches):
            self._copy_places(new, old, places, base)
        del arena  # held until its content was copied

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; the memory of the others is freed.

        Raises UsageError for no rows and for a row that the batch does not have.
        """
        check_kept(rows, self.batch)
        before, arena, base = self._layers, self._arena, self._base
        self._lengths = [self._lengths[row] for row in rows]
        self._lay_out([[cache.rows(rows) for cache in caches] for caches in before])
        for layer, caches in enumerate(before):
            for old, new in zip(caches, self._layers[layer], strict=True):
                size = old.slots * self._token
                for part in (0, 1):
                    for place, row in enumerate(rows):
                        source = base + self._start(old, part) + row * size
                        target = self._base + self._start(new, part) + place * size
                        ctypes.memmove(target, source, size)
        del arena  # held until its content was copied

    # ---- memory ----

    def _tables(self, capacity: int) -> Any:
        """The frequencies `[tables, head_dim / 2]` of a session of `capacity` tokens."""
        ropes = self._engine.spec.ropes
        return _floats([f for rope in ropes for f in rope_frequencies(rope, self._dim, capacity)])

    @property
    def _dim(self) -> int:
        return self._engine.spec.head_dim

    @property
    def _token(self) -> int:
        """Bytes of one key."""
        return self._dim * (2 if self._engine.dtype == "bfloat16" else 4)

    def _bytes(self, cache: CpuCache) -> int:
        return 2 * len(cache.shifts) * cache.slots * self._token

    def _start(self, cache: CpuCache, part: int) -> int:
        """Where the keys (0) or values (1) of a cache begin in the session's memory."""
        return cache.offset + part * self._bytes(cache) // 2

    def _runs(self, layer: int) -> Iterator[tuple[HeadSpan, slice]]:
        """Runs of adjacent heads with equal spans at the present capacity."""
        order = self._head_order[layer]
        spans = [self._plan.head(layer, head, self._capacity) for head in order]
        first = 0
        for head, run in groupby(spans):
            stop = first + sum(1 for _ in run)
            yield head, slice(first, stop)
            first = stop

    def _lay_out(self, layers: list[list[CpuCache]]) -> None:
        """Give every cache its place in fresh memory, and tell the native side."""
        offset = 0
        for cache in (cache for caches in layers for cache in caches):
            cache.offset = offset
            offset += self._bytes(cache)
        self._layers = layers
        self._arena = mmap.mmap(-1, offset)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._arena.madvise(mmap.MADV_HUGEPAGE)
        self._base = address_of(self._arena)
        structs = [self._struct(cache) for caches in layers for cache in caches]
        self._caches = (CacheStruct * len(structs))(*structs)
        ends = [0]
        for caches in layers:
            ends.append(ends[-1] + len(caches))
        self._first_cache = integers(ends)

    def _struct(self, cache: CpuCache) -> CacheStruct:
        return CacheStruct(
            keys=self._base + self._start(cache, 0),
            values=self._base + self._start(cache, 1),
            first=cache.heads.start,
            heads=cache.num_heads,
            size=cache.head.size,
            sink=cache.head.sink,
            window=cache.head.window or 0,
            shifts=integers(cache.shifts),
            gaps=integers(cache.gaps),
        )

    def _grown(
        self, layer: int, caches: Sequence[CpuCache]
    ) -> Iterator[tuple[CpuCache, CpuCache, list[list[int]]]]:
        """Heads that shared a span may part. They never join: they may hold different tokens."""
        for old in caches:
            for head, run in self._runs(layer):
                first, stop = max(run.start, old.heads.start), min(run.stop, old.heads.stop)
                if first < stop:
                    new, places = old.grown(head, slice(first, stop), self._lengths)
                    yield new, old, places

    def _copy_places(
        self, new: CpuCache, old: CpuCache, places: Sequence[Sequence[int]], base: int
    ) -> None:
        """Move the kept `places` of each row into the first slots of the new cache."""
        token, size = self._token, (new.head.size, old.head.size)
        for part in (0, 1):
            target, source = self._base + self._start(new, part), base + self._start(old, part)
            for row, kept in enumerate(places):
                runs = list(old.slot_runs(kept))
                for head in range(new.heads.start, new.heads.stop):
                    to = (row * new.num_heads + head - new.heads.start) * size[0]
                    at = (row * old.num_heads + head - old.heads.start) * size[1]
                    for first, slot, count in runs:
                        ctypes.memmove(
                            target + (to + first) * token,
                            source + (at + slot) * token,
                            count * token,
                        )

    # ---- steps ----

    def _check(self, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> None:
        check_tokens(tokens, wanted, batch=self.batch, vocab_size=self._engine.spec.vocab_size)
        check_room(self._lengths, [len(row) for row in tokens], self._capacity)

    def _feed(
        self,
        tokens: Sequence[Sequence[int]],
        wanted: Sequence[Sequence[int]],
        places: Sequence[int],
        logits: Array,
    ) -> None:
        """Feed everything, step by step; row `b`'s logits start at `logits[places[b]]`."""
        fed = [0] * self.batch
        while segments := self._segments(tokens, fed):
            flat = [
                token
                for row, _, count in segments
                for token in tokens[row][fed[row] : fed[row] + count]
            ]
            asked, targets, start = [], [], 0
            for row, _, count in segments:
                for number, index in enumerate(wanted[row]):
                    if fed[row] <= index < fed[row] + count:
                        asked.append(start + index - fed[row])
                        targets.append(places[row] + number)
                start += count
            self._step(segments, flat, asked, targets, logits)
            for row, _, count in segments:
                fed[row] += count
                self._lengths[row] += count

    def _segments(
        self, tokens: Sequence[Sequence[int]], fed: Sequence[int]
    ) -> list[tuple[int, int, int]]:
        """Row, position and count of the next step's tokens: rows in order, a chunk in all."""
        room, segments = max(self._chunk, self.batch), []
        for row, own in enumerate(tokens):
            count = min(len(own) - fed[row], room)
            if count:
                segments.append((row, self._lengths[row], count))
                room -= count
        return segments

    def _step(
        self,
        segments: Sequence[tuple[int, int, int]],
        tokens: Sequence[int],
        wanted: Sequence[int],
        places: Sequence[int],
        logits: Array,
    ) -> None:
        self._engine.run(
            StepStruct(
                caches=self._caches,
                first_cache=self._first_cache,
                frequencies=self._frequencies,
                segments=(SegmentStruct * len(segments))(
                    *(SegmentStruct(*own) for own in segments)
                ),
                tokens=integers(tokens),
                wanted=integers(wanted),
                places=integers(places),
                num_segments=len(segments),
                num_tokens=len(tokens),
                num_wanted=len(wanted),
                logits=_address(logits),
            )
        )


def rope_frequencies(rope: RopeSpec, head_dim: int, capacity: int) -> list[float]:
    """The frequencies `[head_dim / 2]` of a session, as `decoder.rope_frequencies`."""
    context = rope.original_context
    if rope.kind != "dynamic" or context is None or capacity <= context:
        return list(rope.inv_freq)
    stretch = rope.factor * capacity / context - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def _floats(values: Sequence[float]) -> Any:
    return (ctypes.c_float * len(values))(*values)


def _empty(rows: int, columns: int) -> Array:
    """Float32 `[rows, columns]`: of numpy, which loads fast, of torch where numpy is absent."""
    if find_spec("numpy") is not None:
        import numpy as np

        return np.empty((rows, columns), dtype=np.float32)
    import torch

    return torch.empty(rows, columns, dtype=torch.float32)


def _address(array: Array) -> int:
    address: int = array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data
    return address
