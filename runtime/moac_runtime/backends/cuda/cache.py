"""The KV cache of one layer as the kernels want it: one flat buffer of slots for all heads.

KV head after KV head, each `[B, size, D]` and laid out `[sinks | ring]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moac_runtime.backends.layout import Layout
from moac_runtime.package.span import HeadSpan


class RowContent(NamedTuple):
    """What one row holds of a layer: for each KV head its layout, keys and values `[n, D]`."""

    layouts: tuple[Layout, ...]
    keys: list[Tensor]
    values: list[Tensor]


class LayerCache:
    """Keys and values `[slots, D]` of one layer.

    `layouts[row]`: of each KV head, in packed order; the rows' spans are the same.
    """

    __slots__ = ("keys", "layouts", "values")

    def __init__(
        self,
        layouts: Sequence[tuple[Layout, ...]],
        *,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layouts = tuple(layouts)
        slots = sum(layout.head.size for row in layouts for layout in row)
        # not filled: a slot is written before it is read
        self.keys = torch.empty(slots, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)

    @property
    def bytes(self) -> int:
        """Bytes of storage behind the keys and values."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for layers that are laid out alike."""
        lost = [tuple((layout.shift, layout.gap) for layout in row) for row in self.layouts]
        return (*self._heads(), *lost)

    def spans(self, tables: Any) -> Tensor:
        """The layer's span table `[B, K, 8]`; `tables`: the package's `kernels/tables.py`."""
        by_head = list(zip(*self.layouts, strict=True))
        table: Tensor = tables.span_table(
            self._heads(),
            len(self.layouts),
            shifts=[[layout.shift for layout in head] for head in by_head],
            gaps=[[layout.gap for layout in head] for head in by_head],
        )
        return table

    def row(self, row: int, length: int) -> RowContent:
        """A copy of what a row holds after `length` tokens."""
        found = RowContent(self.layouts[row], [], [])
        for head, layout in enumerate(self.layouts[row]):
            keys, values = self._head(head)
            filled = layout.filled(length)
            found.keys.append(keys[row, :filled].clone())
            found.values.append(values[row, :filled].clone())
        return found

    def fill(self, row: int, content: RowContent) -> None:
        """Take what another row of the same layouts held."""
        for head in range(len(content.layouts)):
            for cache, part in zip(
                self._head(head), (content.keys[head], content.values[head]), strict=True
            ):
                cache[row, : len(part)] = part

    def grown(
        self, heads: Sequence[HeadSpan], rows: Sequence[int], lengths: Sequence[int]
    ) -> LayerCache:
        """A cache of larger spans that holds what this one holds of `rows`, in their order.

        `lengths`: tokens fed to each of them.
        """
        moves = []
        for row, length in zip(rows, lengths, strict=True):
            pairs = zip(self.layouts[row], heads, strict=True)
            moves.append([layout.grown(head, length) for layout, head in pairs])
        new = LayerCache(
            [tuple(layout for layout, _ in row) for row in moves],
            head_dim=self.keys.shape[1],
            dtype=self.keys.dtype,
            device=self.keys.device,
        )
        for head in range(len(heads)):
            for old, copy in zip(self._head(head), new._head(head), strict=True):
                for place, row in enumerate(rows):
                    first = 0
                    for _, slot, count in moves[place][head][1]:
                        copy[place, first : first + count] = old[row, slot : slot + count]
                        first += count
        return new

    def _heads(self) -> list[HeadSpan]:
        return [layout.head for layout in self.layouts[0]]

    def _head(self, head: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one KV head, views `[B, size, D]`."""
        rows = len(self.layouts)
        sizes = [rows * span.size for span in self._heads()]
        first = list(accumulate(sizes, initial=0))[head]
        shape = (rows, sizes[head] // rows, self.keys.shape[1])
        stop = first + sizes[head]
        return self.keys[first:stop].view(shape), self.values[first:stop].view(shape)
