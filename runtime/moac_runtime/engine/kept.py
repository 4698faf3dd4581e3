"""Caches kept after their rows are gone, for prompts that begin with the same tokens.

A cache serves a prompt that goes on from all of its tokens, in a row that passed through the same
capacities: so what follows is, token for token, what reading it all again would give. Nothing is
ever taken back out of a cache.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moac_runtime.backends.session import Snapshot
from moac_runtime.engine.capacity import Path

_LEAST_GAIN = 16  # tokens that a cache must save for it to be worth a copy


@dataclass(frozen=True, slots=True)
class Kept:
    """A row as it stood after `tokens`, having passed through `path`."""

    tokens: tuple[int, ...]
    path: Path
    snapshot: Snapshot


class KeptCaches:
    """Snapshots under `budget` bytes; those unused for longest go first. 0 keeps none."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self.evicted = 0
        self._kept: OrderedDict[tuple[Path, bytes], Kept] = OrderedDict()
        self._lengths: Counter[tuple[Path, int]] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._kept.values())

    def find(self, tokens: Sequence[int], path: Path) -> Kept | None:
        """The longest cache that `tokens` goes on from by one token at least."""
        lengths = {n for p, n in self._lengths if p == path and n < len(tokens)}
        for length in sorted(lengths, reverse=True):
            key = path, _packed(tokens[:length])
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        return None

    def worth_keeping(self, length: int, held: int) -> bool:
        """Whether a cache of `length` tokens saves enough beside one of `held`."""
        return self.budget > 0 and length - held >= _LEAST_GAIN

    def put(self, kept: Kept) -> None:
        """Keep a cache, unless it is larger than the budget; others make room."""
        key = kept.path, _packed(kept.tokens)
        if kept.snapshot.bytes > self.budget:
            return
        self._drop(key)
        while self.bytes + kept.snapshot.bytes > self.budget:
            self._drop(next(iter(self._kept)))
            self.evicted += 1
        self._kept[key] = kept
        self._lengths[kept.path, len(kept.tokens)] += 1
        self.bytes += kept.snapshot.bytes

    def clear(self) -> None:
        """Let all go."""
        self._kept.clear()
        self._lengths.clear()
        self.bytes = 0

    def _drop(self, key: tuple[Path, bytes]) -> None:
        kept = self._kept.pop(key, None)
        if kept is None:
            return
        self.bytes -= kept.snapshot.bytes
        place = kept.path, len(kept.tokens)
        self._lengths[place] -= 1
        if not self._lengths[place]:
            del self._lengths[place]


def _packed(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()
