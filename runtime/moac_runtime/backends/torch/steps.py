"""One step of a session: what the decoder's attention does with the caches, layer by layer.

What depends on the step alone (masks, slots) is made once and shared by all layers whose caches
are laid out alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moac_runtime.backends.torch.attention import (
    Block,
    DecodeView,
    decode_attention,
    decode_view,
    prefill_attention,
    query_blocks,
)
from moac_runtime.backends.torch.cache import Layout, SpanCache
from moac_runtime.package.spec import LayerSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Group:
    """Adjacent KV heads of a layer, in packed order, that share a cache.

    `heads`: KV heads; `queries`: their query heads.
    """

    heads: slice
    queries: slice
    cache: SpanCache


@dataclass(frozen=True, slots=True)
class Segment:
    """Adjacent rows that take the same step: `count` tokens each from position `start` on.

    `flat`: where their tokens stand among the step's tokens, row after row.
    """

    rows: slice
    start: int
    count: int
    flat: slice

    def shares(self) -> Iterator[tuple[int, int]]:
        """Each row, and where its tokens begin among the step's tokens."""
        for index, row in enumerate(range(self.rows.start, self.rows.stop)):
            yield row, self.flat.start + index * self.count


class PrefillStep:
    """Attention of a step that adds any number of tokens to some rows; a decoder's `attend`."""

    def __init__(
        self, layers: Sequence[Sequence[Group]], segments: Sequence[Segment], spec: ModelSpec
    ) -> None:
        self._layers = layers
        self._segments = segments
        self._spec = spec
        self._blocks: dict[tuple[Layout, int], list[Block]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q` `[M, H, D]`, `k` and `v` `[M, K, D]`, rotated; returns `[M, H, D]`."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for segment in self._segments:
            by_row = (segment.rows.stop - segment.rows.start, segment.count)
            parts = [x[segment.flat].view(*by_row, *x.shape[1:]) for x in (q, k, v, out)]
            for group in self._layers[layer]:
                self._attend(self._spec.layer(layer), segment, group, *parts)
        return out

    def _attend(
        self,
        layer: LayerSpec,
        segment: Segment,
        group: Group,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
    ) -> None:
        """One cache's heads, `[rows, T, heads, D]`; what they attend to goes into `out`."""
        cache, share = group.cache, self._spec.group_size
        k, v = k[:, :, group.heads].transpose(1, 2), v[:, :, group.heads].transpose(1, 2)
        old_k, old_v, positions = cache.held(segment.rows, segment.start)
        found = prefill_attention(
            q[:, :, group.queries]
            .view(*q.shape[:2], -1, share, q.shape[3])
            .permute(0, 2, 3, 1, 4),
            torch.cat((old_k, k), dim=2),
            torch.cat((old_v, v), dim=2),
            self._query_blocks(cache, segment, positions),
            layer.query_scale,
            layer.logit_cap,
        )
        out[:, :, group.queries] = found.permute(0, 3, 1, 2, 4).flatten(2, 3)
        cache.write(segment.rows, segment.start, k, v)

    def _query_blocks(self, cache: SpanCache, segment: Segment, held: Tensor) -> list[Block]:
        key = (cache.layout, segment.rows.start)
        if key not in self._blocks:
            keys = [*held.tolist(), *range(segment.start, segment.start + segment.count)]
            self._blocks[key] = query_blocks(
                cache.layout.head,
                segment.start,
                segment.count,
                keys,
                dtype=cache.keys.dtype,
                device=cache.keys.device,
            )
        return self._blocks[key]


class DecodeStep:
    """Attention of a step that adds one token to every row; a decoder's `attend`."""

    def __init__(
        self, layers: Sequence[Sequence[Group]], lengths: Sequence[int], spec: ModelSpec
    ) -> None:
        self._layers = layers
        self._lengths = lengths
        self._spec = spec
        self._views: dict[Layout, DecodeView] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q` `[B, H, D]`, `k` and `v` `[B, K, D]`, rotated; returns `[B, H, D]`."""
        kind = self._spec.layer(layer)
        parts = [self._attend(kind, group, q, k, v) for group in self._layers[layer]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _attend(self, layer: LayerSpec, group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, view = group.cache, self._view(group.cache)
        cache.put(view.slots, k[:, group.heads], v[:, group.heads])
        return decode_attention(
            q[:, group.queries].view(len(q), -1, self._spec.group_size, q.shape[2]),
            cache.keys,
            cache.values,
            view,
            layer.query_scale,
            layer.logit_cap,
        ).flatten(1, 2)

    def _view(self, cache: SpanCache) -> DecodeView:
        layout = cache.layout
        if layout not in self._views:
            self._views[layout] = decode_view(
                layout, self._lengths, dtype=cache.keys.dtype, device=cache.keys.device
            )
        return self._views[layout]
