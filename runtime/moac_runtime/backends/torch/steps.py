"""One step of a session: what the decoder's attention does with the caches, layer by layer.

Products take all rows' tokens together; attention takes row after row, all heads of a span at
once. What depends on the step alone (masks, slots) is made once a row and shared by all layers
whose caches are laid out alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moac_runtime.backends.layout import Layout
from moac_runtime.backends.torch.attention import (
    Block,
    DecodeView,
    decode_attention,
    decode_view,
    prefill_attention,
    query_blocks,
)
from moac_runtime.backends.torch.cache import SpanCache
from moac_runtime.package.spec import LayerSpec, ModelSpec


@dataclass(slots=True)
class Share:
    """A row's part of a step: tokens from position `start` on, `flat` among the step's tokens.

    `layers[layer]`: the row's caches.
    """

    layers: Sequence[Sequence[SpanCache]]
    start: int
    flat: slice
    _blocks: dict[Layout, list[Block]] = field(default_factory=dict)
    _views: dict[Layout, DecodeView] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Tokens of the part."""
        return int(self.flat.stop - self.flat.start)

    def view(self, cache: SpanCache) -> DecodeView:
        """Where the part's only token goes, and what it sees."""
        layout = cache.run.layout
        if layout not in self._views:
            self._views[layout] = decode_view(
                layout, self.start, dtype=cache.keys.dtype, device=cache.keys.device
            )
        return self._views[layout]

    def blocks(self, cache: SpanCache, held: Sequence[int]) -> list[Block]:
        """The part's queries, and what they see of the positions `held` and of each other."""
        layout = cache.run.layout
        if layout not in self._blocks:
            self._blocks[layout] = query_blocks(
                layout.head,
                self.start,
                self.count,
                [*held, *range(self.start, self.start + self.count)],
                dtype=cache.keys.dtype,
                device=cache.keys.device,
            )
        return self._blocks[layout]


class StepAttention:
    """Attention of a step that adds tokens to some rows; a decoder's `attend`.

    `sink_logits`: each layer's `[H]`, None where it has none.
    """

    def __init__(
        self, shares: Sequence[Share], spec: ModelSpec, sink_logits: Sequence[Tensor | None]
    ) -> None:
        self._shares = shares
        self._spec = spec
        self._sinks = [
            None if own is None else own.view(spec.num_kv_heads, -1) for own in sink_logits
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q` `[M, H, D]`, `k` and `v` `[M, K, D]`, rotated; returns `[M, H, D]`."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kind = self._spec.layer(layer)
        grouped = (*k.shape[:2], self._spec.group_size, k.shape[2])
        every = q.view(grouped), k, v, out.view(grouped)
        for share in self._shares:
            if share.count == 1:
                parts, attend = [x[share.flat.start] for x in every], self._decode
            else:
                parts, attend = [x[share.flat].transpose(0, 1) for x in every], self._prefill
            for cache in share.layers[layer]:
                heads = slice(cache.run.first, cache.run.stop)
                sinks = self._sinks[layer]
                own = None if sinks is None else sinks[heads]
                attend(kind, own, share, cache, *(part[heads] for part in parts))
        return out

    def _decode(
        self,
        kind: LayerSpec,
        sinks: Tensor | None,
        share: Share,
        cache: SpanCache,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
    ) -> None:
        """One token: `q` `[g, G, D]`, `k` and `v` `[g, D]`; what it attends to goes into `out`."""
        view = share.view(cache)
        cache.put(view.slot, k, v)
        held = cache.keys, cache.values
        out.copy_(decode_attention(q, *held, view, kind.query_scale, kind.logit_cap, sinks))

    def _prefill(
        self,
        kind: LayerSpec,
        sinks: Tensor | None,
        share: Share,
        cache: SpanCache,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
    ) -> None:
        """Many tokens: `q` and `out` `[g, T, G, D]`, `k` and `v` `[g, T, D]`."""
        old_k, old_v, positions = cache.held(share.start)
        found = prefill_attention(
            q.transpose(1, 2),
            torch.cat((old_k, k), dim=1),
            torch.cat((old_v, v), dim=1),
            share.blocks(cache, positions),
            kind.query_scale,
            kind.logit_cap,
            sinks,
        )
        out.copy_(found.transpose(1, 2))
        cache.write(share.start, k, v)
