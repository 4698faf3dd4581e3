"""The KV cache of a row's heads that share a span: `[sinks | ring]`, exactly `size` slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moac_runtime.backends.layout import HeadRun, Stretch
from moac_runtime.backends.torch.rounding import Format, Parts


class SpanCache:
    """Keys and values of one run of heads of one row, as `format` holds them.

    `keys`, `values`: parts `[heads, size, width]` each.
    """

    __slots__ = ("format", "keys", "run", "values")

    def __init__(self, run: HeadRun, format: Format, device: torch.device | str = "cpu") -> None:
        self.run, self.format = run, format
        # not filled: a slot is written before it is read
        self.keys, self.values = format.empty(run, device), format.empty(run, device)

    @property
    def bytes(self) -> int:
        """Bytes of storage behind the keys and values."""
        return sum(part.untyped_storage().nbytes() for part in (*self.keys, *self.values))

    @property
    def device(self) -> torch.device:
        """Where the keys and values lie."""
        return self.keys[0].device

    def slot_bytes(self) -> int:
        """Bytes of one slot of all heads, padding left out."""
        return sum(part[:, :1].nbytes for part in (*self.keys, *self.values))

    def write(self, start: int, k: Parts, v: Parts) -> None:
        """Store `k`, `v`, encoded, `[heads, T, width]`, of positions `start` onward.

        What falls out of the span on the way is never written.
        """
        for position, slot, count in self.run.layout.written(start, k[0].shape[1]):
            source = slice(position - start, position - start + count)
            for held, new in self._pairs(k, v):
                held[:, slot : slot + count] = new[:, source]

    def put(self, slot: int, k: Tensor, v: Tensor) -> None:
        """Store one token, `k` and `v` `[heads, D]`, at one slot."""
        for held, new in self._pairs(self.format.encoded(k), self.format.encoded(v)):
            held[:, slot] = new

    def held(self, length: int) -> tuple[Parts, Parts, list[int]]:
        """Keys and values `[heads, n, width]` held after `length` tokens, oldest first.

        Third: their positions, ascending.
        """
        stretches = self.run.layout.held(length)
        positions = [p for first, _, count in stretches for p in range(first, first + count)]
        return _picked(self.keys, stretches), _picked(self.values, stretches), positions

    def filled(self, length: int) -> tuple[Parts, Parts]:
        """A copy of the keys and values in the slots in use after `length` tokens."""
        slots = slice(0, self.run.layout.filled(length))
        keys, values = ([part[:, slots].clone() for part in own] for own in self._own)
        return tuple(keys), tuple(values)

    def fill(self, keys: Parts, values: Parts) -> None:
        """Take `keys` and `values` `[heads, n, width]` into the first slots."""
        for held, new in self._pairs(keys, values):
            held[:, : new.shape[1]] = new

    def grown(self, run: HeadRun, moved: Sequence[Stretch]) -> SpanCache:
        """A cache of some of the heads under a larger span, with what `moved` says of this one."""
        new = SpanCache(run, self.format, self.device)
        heads = slice(run.first - self.run.first, run.stop - self.run.first)
        own = ([part[heads] for part in parts] for parts in self._own)
        new.fill(*(_picked(parts, moved) for parts in own))
        return new

    @property
    def _own(self) -> tuple[Parts, Parts]:
        return self.keys, self.values

    def _pairs(self, keys: Parts, values: Parts) -> Iterator[tuple[Tensor, Tensor]]:
        """Each part with what is to be put into it."""
        return zip((*self.keys, *self.values), (*keys, *values), strict=True)


def _picked(parts: Sequence[Tensor], stretches: Sequence[Stretch]) -> Parts:
    """Of parts `[heads, size, width]` the slots of `stretches`, one after another."""
    return tuple(_picked_part(part, stretches) for part in parts)


def _picked_part(x: Tensor, stretches: Sequence[Stretch]) -> Tensor:
    parts = [x[:, slot : slot + count] for _, slot, count in stretches]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=1) if parts else x[:, :0]
