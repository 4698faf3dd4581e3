"""A row's memory: its caches side by side in one allocation, told to the native kernels.

The kernels fill slots by the rule of `layout.Layout`.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from moac_runtime.backends.cpu.library import CACHE_PLAIN, CacheStruct, integers
from moac_runtime.backends.cpu.weights import address_of
from moac_runtime.backends.layout import Growth, HeadRun, Stretch


class Held(NamedTuple):
    """What a row holds, apart from its memory: `parts`, for each head keys and then values."""

    layers: list[list[HeadRun]]
    parts: list[bytes]


class CpuRow:
    """One row: `layers[layer]` are the runs of heads it has caches of, `memory` holds them all.

    `token`: bytes of one key of one head. `frequencies` `[tables, head_dim / 2]`: of RoPE, a C
    array. `caches` and `first_cache` are what a native step reads; they and the memory stay where
    they are.
    """

    def __init__(
        self, layers: list[list[HeadRun]], *, capacity: int, token: int, frequencies: Any
    ) -> None:
        self.capacity = capacity
        self.length = 0
        self.layers = layers
        self.frequencies = frequencies
        self._token = token
        runs = [run for layer in layers for run in layer]
        starts = list(accumulate((2 * run.slots * token for run in runs), initial=0))
        self.memory = mmap.mmap(-1, starts[-1])
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        base = address_of(self.memory)
        self.caches = (CacheStruct * len(runs))(
            *(self._cache(run, base + start) for run, start in zip(runs, starts, strict=False))
        )
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
        before = _by_layer(old.caches, old.layers)
        for grown, sources, caches in zip(
            growth, before, _by_layer(self.caches, self.layers), strict=True
        ):
            for (run, source, moved), new in zip(grown, caches, strict=True):
                for head in range(run.first, run.stop):
                    self._move(new, sources[source], head, moved)

    def _move(self, new: Any, old: Any, head: int, moved: Sequence[Stretch]) -> None:
        """Move one head's tokens into the first slots of its new cache."""
        token = self._token
        for target, source in ((new.keys, old.keys), (new.values, old.values)):
            to = target + (head - new.first) * new.size * token
            at = source + (head - old.first) * old.size * token
            for stretch in moved:
                count = stretch.size * token
                ctypes.memmove(to, at + stretch.slot * token, count)
                to += count

    def _filled(self) -> Iterator[tuple[int, int]]:
        """Address and bytes of the filled slots of each head: keys, then values."""
        runs = (run for layer in self.layers for run in layer)
        for run, cache in zip(runs, self.caches, strict=True):
            size = run.layout.filled(self.length) * self._token
            for start in (cache.keys, cache.values):
                for head in range(run.num_heads):
                    yield start + head * run.layout.head.size * self._token, size

    def _cache(self, run: HeadRun, address: int) -> CacheStruct:
        head = run.layout.head
        return CacheStruct(
            keys=address,
            values=address + run.slots * self._token,
            first=run.first,
            heads=run.num_heads,
            size=head.size,
            sink=head.sink,
            window=head.window or 0,
            shift=run.layout.shift,
            gap=run.layout.gap,
            format=CACHE_PLAIN,
        )


def _by_layer(caches: Any, layers: Sequence[Sequence[HeadRun]]) -> Iterator[list[Any]]:
    first = 0
    for layer in layers:
        yield [caches[first + index] for index in range(len(layer))]
        first += len(layer)
