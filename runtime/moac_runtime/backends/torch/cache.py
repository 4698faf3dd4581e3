"""The KV cache of a row's heads that share a span: `[sinks | ring]`, exactly `size` slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moac_runtime.backends.layout import HeadRun, Stretch


class SpanCache:
    """Keys and values `[heads, size, D]` of one run of heads of one row."""

    __slots__ = ("keys", "run", "values")

    def __init__(
        self,
        run: HeadRun,
        *,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (run.num_heads, run.layout.head.size, head_dim)
        self.run = run
        # not filled: a slot is written before it is read
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        """Bytes of storage behind the keys and values."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        """Store `k`, `v` `[heads, T, D]` of positions `start` onward.

        What falls out of the span on the way is never written.
        """
        for position, slot, count in self.run.layout.written(start, k.shape[1]):
            source = slice(position - start, position - start + count)
            self.keys[:, slot : slot + count] = k[:, source]
            self.values[:, slot : slot + count] = v[:, source]

    def put(self, slot: int, k: Tensor, v: Tensor) -> None:
        """Store one token, `k` and `v` `[heads, D]`, at one slot."""
        self.keys[:, slot] = k
        self.values[:, slot] = v

    def held(self, length: int) -> tuple[Tensor, Tensor, list[int]]:
        """Keys and values `[heads, n, D]` held after `length` tokens, oldest first.

        Third: their positions, ascending.
        """
        stretches = self.run.layout.held(length)
        positions = [p for first, _, count in stretches for p in range(first, first + count)]
        return _picked(self.keys, stretches), _picked(self.values, stretches), positions

    def filled(self, length: int) -> tuple[Tensor, Tensor]:
        """A copy of the keys and values in the slots in use after `length` tokens."""
        slots = slice(0, self.run.layout.filled(length))
        return self.keys[:, slots].clone(), self.values[:, slots].clone()

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Take `keys` and `values` `[heads, n, D]` into the first slots."""
        self.keys[:, : keys.shape[1]] = keys
        self.values[:, : values.shape[1]] = values

    def grown(self, run: HeadRun, moved: Sequence[Stretch]) -> SpanCache:
        """A cache of some of the heads under a larger span, with what `moved` says of this one."""
        keys, values = self.keys, self.values
        new = SpanCache(run, head_dim=keys.shape[2], dtype=keys.dtype, device=keys.device)
        heads = slice(run.first - self.run.first, run.stop - self.run.first)
        new.fill(_picked(keys[heads], moved), _picked(values[heads], moved))
        return new


def _picked(x: Tensor, stretches: Sequence[Stretch]) -> Tensor:
    """Of `x` `[heads, size, D]` the slots of `stretches`, one after another."""
    parts = [x[:, slot : slot + count] for _, slot, count in stretches]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=1) if parts else x[:, :0]
