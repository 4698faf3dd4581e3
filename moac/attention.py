"""The attention functions this package gives to transformers, through `AttentionInterface`.

A call's data (a recorder, a plan's spans) travels as a keyword of `model(...)`, which
transformers hands down to the attention function: no global state, safe under recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from moac.profiling.attention import InfluenceRecorder, influence_attention
from moac_kernels.reference import layer_mask, masked_attention
from moac_runtime.span import HeadSpan, visible

INFLUENCE = "moac_influence"  # measures what spans would cost, on the way back
PLANNED = "moac_planned"  # runs a plan, skipping what no query sees: for measuring plans
REFERENCE = "moac_reference"  # runs a plan by the oracle, dense masks in float32: for checking

_QUERY_ROWS = 256


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run `model` with one of this file's attention functions, then put its own back."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _influence(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    *,
    moac_recorder: InfluenceRecorder,
    **_: Any,
) -> tuple[Tensor, None]:
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    out = influence_attention(
        query, key, value, scale=scaling, layer=layer, recorder=moac_recorder
    )
    return out.transpose(1, 2), None


def _planned(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    *,
    moac_spans: Sequence[Sequence[HeadSpan]],
    **_: Any,
) -> tuple[Tensor, None]:
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return span_attention(query, key, value, moac_spans[layer], scaling).transpose(1, 2), None


def _reference(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    *,
    moac_spans: Sequence[Sequence[HeadSpan]],
    **_: Any,
) -> tuple[Tensor, None]:
    heads = moac_spans[int(module.layer_idx)]  # type: ignore[arg-type]
    place = torch.arange(query.shape[2], device=query.device)
    parts = []
    for rows in place.split(_QUERY_ROWS):
        mask = layer_mask(lambda i, j, h: visible(i, j, heads[h]), rows, place, len(heads))
        parts.append(masked_attention(query[:, :, rows], key, value, mask, scaling))
    return torch.cat(parts, dim=2).to(query.dtype).transpose(1, 2), None


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: Sequence[HeadSpan], scale: float
) -> Tensor:
    """Attention of whole sequences, each KV head under its own span.

    `q` `[B, H, T, D]`, `k` and `v` `[B, K, T, D]`, one span per KV head; returns `[B, H, T, D]`.
    """
    share = q.shape[1] // k.shape[1]
    parts = [
        _one_head(q[:, h * share : (h + 1) * share], k[:, h : h + 1], v[:, h : h + 1], head, scale)
        for h, head in enumerate(heads)
    ]
    return torch.cat(parts, dim=1)


def _one_head(q: Tensor, k: Tensor, v: Tensor, head: HeadSpan, scale: float) -> Tensor:
    length = q.shape[2]
    k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
    if head.size >= length and (head.window is None or head.window >= length):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    place = torch.arange(length, device=q.device)
    parts = []
    for start in range(0, length, _QUERY_ROWS):
        stop = min(start + _QUERY_ROWS, length)
        # Keys between the sink and the oldest row's window are out of every row's sight.
        first = max(start - (head.size - head.sink) + 1, head.sink)
        if first <= head.sink:
            keys = place[:stop]
        else:
            keys = torch.cat([place[: head.sink], place[first:stop]])
        mask = visible(place[start:stop, None], keys[None, :], head)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, keys], v[:, :, keys], attn_mask=mask, scale=scale
            )
        )
    return torch.cat(parts, dim=2)


AttentionInterface.register(INFLUENCE, _influence)
AttentionInterface.register(PLANNED, _planned)
AttentionInterface.register(REFERENCE, _reference)
