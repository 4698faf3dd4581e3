"""A row's memory: its caches side by side in one allocation, told to the native kernels.

The kernels fill slots by the rule of `layout.Layout`.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from moac_runtime.backends.cpu.library import (
    CACHE_INT4,
    CACHE_INT8,
    CACHE_PLAIN,
    CacheStruct,
    integers,
)
from moac_runtime.backends.cpu.weights import address_of
from moac_runtime.backends.layout import Growth, HeadRun, Stretch
from moac_runtime.package.kv_format import KvShape

_FORMATS = {None: CACHE_PLAIN, 8: CACHE_INT8, 4: CACHE_INT4}


class Held(NamedTuple):
    """What a row holds, apart from its memory: `parts`, of each run its keys, then its values,
    head after head; of rounded ones the codes of all heads, then the scales of all."""

    layers: list[list[HeadRun]]
    parts: list[bytes]


class _Part(NamedTuple):
    """A run's codes, or scales, of keys or values: where they begin, and the bytes from one head
    to the next and from one slot to the next."""

    start: int
    head: int
    slot: int


def _parts_of(run: HeadRun, kv: KvShape, address: int) -> list[_Part]:
    """What a run's memory at `address` holds, in the order in which it lies."""
    memory, bits = run.memory(kv), run.layout.head.bits
    codes, scales = kv.code_bytes(bits), kv.scale_bytes(bits)
    found = (
        _Part(address + memory.keys, memory.codes, codes),
        _Part(address + memory.key_scales, memory.scales, scales),
        _Part(address + memory.values, memory.codes, codes),
        _Part(address + memory.value_scales, memory.scales, scales),
    )
    return [part for part in found if part.slot]


class CpuRow:
    """One row: `layers[layer]` are the runs of heads it has caches of, `memory` holds them all.

    `kv`: bytes of one key of one head. `frequencies` `[tables, head_dim / 2]`: of RoPE, a C
    array. `caches` and `first_cache` are what a native step reads; they and the memory stay where
    they are.
    """

    def __init__(
        self, layers: list[list[HeadRun]], *, capacity: int, kv: KvShape, frequencies: Any
    ) -> None:
        self.capacity = capacity
        self.length = 0
        self.layers = layers
        self.frequencies = frequencies
        runs = [run for layer in layers for run in layer]
        starts = list(accumulate((run.memory(kv).size for run in runs), initial=0))
        self.memory = mmap.mmap(-1, starts[-1])
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        base = address_of(self.memory)
        places = [(run, base + start) for run, start in zip(runs, starts, strict=False)]
        self.caches = (CacheStruct * len(runs))(*(_cache(run, kv, at) for run, at in places))
        self._parts = [_parts_of(run, kv, at) for run, at in places]
        self.first_cache = integers(accumulate(map(len, layers), initial=0))

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, all layers and heads."""
        return len(self.memory)

    def free(self) -> None:
        """Give the memory back; no step may read the row any more."""
        self.memory.close()

    def held(self) -> Held:
        """A copy of what the row holds, free slots left out."""
        parts = [ctypes.string_at(*place) for place in self._filled()]
        return Held(self.layers, parts)

    @property
    def filled_bytes(self) -> int:
        """Bytes of the slots in use."""
        return sum(size for _, size in self._filled())

    def held_from(self, data: memoryview) -> Held:
        """What a copy of this row held whose parts, one after another, are `data`."""
        ends = accumulate((size for _, size in self._filled()), initial=0)
        return Held(self.layers, [data[first:stop].tobytes() for first, stop in pairwise(ends)])

    def take(self, held: Held, length: int) -> None:
        """Hold what another row of the same layers held after `length` tokens."""
        self.length = length
        for (target, size), part in zip(self._filled(), held.parts, strict=True):
            ctypes.memmove(target, part, size)

    def take_grown(self, old: CpuRow, growth: Sequence[Sequence[Growth]]) -> None:
        """Hold what `old`, which grew into this row, keeps."""
        self.length = old.length
        parts = iter(self._parts)
        before = iter(old._parts)
        for grown, old_runs in zip(growth, old.layers, strict=True):
            sources = [(run.first, next(before)) for run in old_runs]
            for run, source, moved in grown:
                first, source_parts = sources[source]
                for new, held in zip(next(parts), source_parts, strict=True):
                    _move(new, held, run.num_heads, run.first - first, moved)

    def _filled(self) -> Iterator[tuple[int, int]]:
        """Address and bytes of the filled slots of each head, part by part."""
        runs = (run for layer in self.layers for run in layer)
        for run, parts in zip(runs, self._parts, strict=True):
            filled = run.layout.filled(self.length)
            for part in parts:
                for head in range(run.num_heads):
                    yield part.start + head * part.head, filled * part.slot


def _move(new: _Part, old: _Part, heads: int, skipped: int, moved: Sequence[Stretch]) -> None:
    """Move the tokens of `heads` heads, after the first `skipped` of the old part, into the first
    slots of the new one."""
    for head in range(heads):
        target, source = new.start + head * new.head, old.start + (skipped + head) * old.head
        for stretch in moved:
            size = stretch.size * new.slot
            ctypes.memmove(target, source + stretch.slot * old.slot, size)
            target += size


def _cache(run: HeadRun, kv: KvShape, address: int) -> CacheStruct:
    head, memory = run.layout.head, run.memory(kv)
    return CacheStruct(
        keys=address + memory.keys,
        values=address + memory.values,
        first=run.first,
        heads=run.num_heads,
        size=head.size,
        sink=head.sink,
        window=head.window or 0,
        shift=run.layout.shift,
        gap=run.layout.gap,
        format=_FORMATS[head.bits],
    )
