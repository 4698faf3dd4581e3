"""One step of a session: what the decoder's attention does with the caches, layer by layer.

Products take all rows' tokens together. Attention takes row after row, all heads of a span at
once; rows that are fed one token and see as much share a call while copying them costs less than
calls. What depends on the step alone (masks, slots) is made once a row and shared by all layers
whose caches are laid out alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
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
from moac_runtime.backends.torch.rounding import Parts
from moac_runtime.package.spec import LayerSpec, ModelSpec

# Of a cache: what is copied for less than a call of fused attention costs.
JOINED_BYTES = 1 << 20


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
                layout, self.start, dtype=cache.format.dtype, device=cache.device
            )
        return self._views[layout]

    def joins(self, cache: SpanCache) -> Hashable:
        """What the caches that share a call in a step have in common.

        They are copied side by side for it, so none is larger than pays.
        """
        run, view = cache.run, self.view(cache)
        if view.mask is not None or view.filled * cache.slot_bytes() > JOINED_BYTES:
            return run.first, self.flat.start
        return run.first, run.stop, view.filled, run.layout.head.bits

    def blocks(self, cache: SpanCache, held: Sequence[int]) -> list[Block]:
        """The part's queries, and what they see of the positions `held` and of each other."""
        layout = cache.run.layout
        if layout not in self._blocks:
            self._blocks[layout] = query_blocks(
                layout.head,
                self.start,
                self.count,
                [*held, *range(self.start, self.start + self.count)],
                dtype=cache.format.dtype,
                device=cache.device,
            )
        return self._blocks[layout]


class StepAttention:
    """Attention of a step that adds tokens to some rows; a decoder's `attend`.

    `sink_logits`: each layer's `[H]`, None where it has none.
    """

    def __init__(
        self, shares: Sequence[Share], spec: ModelSpec, sink_logits: Sequence[Tensor | None]
    ) -> None:
        self._alone = [share for share in shares if share.count == 1]
        self._many = [share for share in shares if share.count > 1]
        self._spec = spec
        self._sinks = [
            None if own is None else own.view(spec.num_kv_heads, -1) for own in sink_logits
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q` `[M, H, D]`, `k` and `v` `[M, K, D]`, rotated; returns `[M, H, D]`."""
        kind = self._spec.layer(layer)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        grouped = (*k.shape[:2], self._spec.group_size, k.shape[2])
        every = q.view(grouped), k, v, out.view(grouped)
        for parts in self._alike(layer):
            run, sinks = parts[0][1].run, self._sinks_of(layer, parts[0][1])
            self._decode(kind, sinks, parts, *(x[:, run.first : run.stop] for x in every))
        for share in self._many:
            own = [x[share.flat].transpose(0, 1) for x in every]
            for cache in share.layers[layer]:
                heads = slice(cache.run.first, cache.run.stop)
                sinks = self._sinks_of(layer, cache)
                self._prefill(kind, sinks, share, cache, *(part[heads] for part in own))
        return out

    def _sinks_of(self, layer: int, cache: SpanCache) -> Tensor | None:
        """The logits beside the scores of a cache's heads, `[g, G]`."""
        own = self._sinks[layer]
        return None if own is None else own[cache.run.first : cache.run.stop]

    def _alike(self, layer: int) -> Iterable[list[tuple[Share, SpanCache]]]:
        """The caches of rows that are fed one token, those together that share a call."""
        found: dict[Hashable, list[tuple[Share, SpanCache]]] = {}
        for share in self._alone:
            for cache in share.layers[layer]:
                found.setdefault(share.joins(cache), []).append((share, cache))
        return found.values()

    def _decode(
        self,
        kind: LayerSpec,
        sinks: Tensor | None,
        parts: Sequence[tuple[Share, SpanCache]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
    ) -> None:
        """One token of some rows of `q` and `out` `[M, g, G, D]`, `k` and `v` `[M, g, D]`."""
        places = [share.flat.start for share, _ in parts]
        for place, (share, cache) in zip(places, parts, strict=True):
            cache.put(share.view(cache).slot, k[place], v[place])
        share, cache = parts[0]
        view, held = share.view(cache), cache.format
        keys = held.decoded(_joined([cache.keys for _, cache in parts], view.filled))
        values = held.decoded(_joined([cache.values for _, cache in parts], view.filled))
        rows = _places(places)
        found = decode_attention(
            held.turned(q[rows]), keys, values, view, kind.query_scale, kind.logit_cap, sinks
        )
        out[rows] = held.turned(found).to(out.dtype)

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
        held = cache.format
        new_k, new_v = held.encoded(k), held.encoded(v)
        found = prefill_attention(
            held.turned(q.transpose(1, 2)),
            held.decoded(_followed(old_k, new_k)),
            held.decoded(_followed(old_v, new_v)),
            share.blocks(cache, positions),
            kind.query_scale,
            kind.logit_cap,
            sinks,
        )
        out.copy_(held.turned(found).transpose(1, 2))
        cache.write(share.start, new_k, new_v)


def _followed(old: Parts, new: Parts) -> list[Tensor]:
    """Parts `[g, n, width]` and after them others."""
    return [torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)]


def _joined(caches: Sequence[Parts], filled: int) -> list[Tensor]:
    """The first slots of caches `[g, S, width]`, `[n, g, filled, width]`; one alone is not
    copied."""
    if len(caches) == 1:
        return [part[None, :, :filled] for part in caches[0]]
    alike = zip(*caches, strict=True)
    return [torch.stack([part[:, :filled] for part in parts]) for parts in alike]


def _places(ascending: list[int]) -> slice | list[int]:
    """Some places as a slice where they lie side by side."""
    first, stop = ascending[0], ascending[-1] + 1
    return slice(first, stop) if stop - first == len(ascending) else ascending
