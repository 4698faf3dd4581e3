"""The KV cache of one layer as the kernels want it: one flat buffer of slots for all heads.

KV head after KV head, each `[B, size, D]` and laid out `[sinks | ring]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from moac_runtime.backends.torch.cache import Layout
from moac_runtime.package.span import HeadSpan


class LayerCache:
    """Keys and values `[slots, D]` of one layer; `layouts`: of each KV head, in packed order."""

    __slots__ = ("_batch", "keys", "layouts", "values")

    def __init__(
        self,
        layouts: Sequence[Layout],
        batch: int,
        *,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layouts = tuple(layouts)
        self._batch = batch
        slots = batch * sum(layout.head.size for layout in layouts)
        # not filled: a slot is written before it is read
        self.keys = torch.empty(slots, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)

    @property
    def bytes(self) -> int:
        """Bytes of storage behind the keys and values."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def spans(self, tables: Any) -> Tensor:
        """The layer's span table `[B, K, 8]`; `tables`: the package's `kernels/tables.py`."""
        table: Tensor = tables.span_table(
            [layout.head for layout in self.layouts],
            self._batch,
            shifts=[layout.shifts for layout in self.layouts],
            gaps=[layout.gaps for layout in self.layouts],
        )
        return table

    def selected(self, rows: Sequence[int]) -> LayerCache:
        """A copy that holds these rows alone, in this order; a row may come twice."""
        new = self._like([layout.rows(rows) for layout in self.layouts], len(rows))
        index = torch.tensor(rows, device=self.keys.device)
        for head in range(len(self.layouts)):
            for old, copy in zip(self._head(head), new._head(head), strict=True):
                torch.index_select(old, 0, index, out=copy)
        return new

    def grown(self, heads: Sequence[HeadSpan], lengths: Sequence[int]) -> LayerCache:
        """A cache of larger spans that holds what this one holds; `lengths`: tokens fed a row."""
        pairs = zip(self.layouts, heads, strict=True)
        moves = [layout.grown(head, lengths) for layout, head in pairs]
        new = self._like([layout for layout, _ in moves], self._batch)
        for head, (_, slots) in enumerate(moves):
            for old, copy in zip(self._head(head), new._head(head), strict=True):
                for row, held in enumerate(slots):
                    copy[row, : len(held)] = old[row].index_select(0, held.to(old.device))
        return new

    def _head(self, head: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one KV head, views `[B, size, D]`."""
        sizes = [self._batch * layout.head.size for layout in self.layouts]
        first = list(accumulate(sizes, initial=0))[head]
        shape = (self._batch, self.layouts[head].head.size, self.keys.shape[1])
        stop = first + sizes[head]
        return self.keys[first:stop].view(shape), self.values[first:stop].view(shape)

    def _like(self, layouts: Sequence[Layout], batch: int) -> LayerCache:
        return LayerCache(
            layouts,
            batch,
            head_dim=self.keys.shape[1],
            dtype=self.keys.dtype,
            device=self.keys.device,
        )


def fresh_layouts(heads: Sequence[HeadSpan], batch: int) -> list[Layout]:
    """The layouts of heads that lost nothing yet."""
    return [Layout(head, (0,) * batch, (0,) * batch) for head in heads]
