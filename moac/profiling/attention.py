"""Causal attention whose backward pass also measures what masking each span would cost.

First-order influence in its joint form. Row i attends with weights A_ij; a candidate span masks
the set M_i of keys, of mass m_i. Renormalised, the output moves by
`-(1 / (1 - m_i)) * sum_{j in M_i} A_ij (V_j - O_i)`, so the loss moves by

    -(1 / (1 - m_i)) * sum_{j in M_i} A_ij (G_ij - dO_i . O_i),    G_ij = dO_i . V_j.

`A_ij (G_ij - dO_i . O_i)` is what flash attention's backward calls dS, so influence costs two
block sums on tiles the backward pass computes anyway, and no N x N matrix is kept.
MoA (arXiv 2406.14909, section 4.2) gives the single-entry form; the joint form counts a whole set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_TILE_ELEMENTS = 1 << 21
_LEAST_MASS_LEFT = 1e-3


@dataclass(slots=True)
class InfluenceRecorder:
    """Collects one table `[kv_heads, spans]` per layer during a backward pass.

    Entry `s` of a table is the loss change, in nats, of giving that KV head a span of
    `s * block` tokens, `sink` of them pinned; spans at or under the sink are infinite.
    `windows[layer]` is the checkpoint's own sliding window in tokens, or None.
    """

    sink: int
    block: int
    windows: tuple[int | None, ...]
    tables: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sink % self.block:
            raise ValueError(f"sink must be a multiple of block, got {self.sink}, {self.block}")


def influence_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int, recorder: InfluenceRecorder
) -> Tensor:
    """Causal attention `[B, H, T, D]` over `[B, K, T, D]` that records influence on backward."""
    out: Tensor = _InfluenceAttention.apply(q, k, v, scale, layer, recorder)  # type: ignore[no-untyped-call]
    return out


class _InfluenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        layer: int,
        recorder: InfluenceRecorder,
    ) -> Tensor:
        out = _causal_attention(q, k, v, scale, recorder.windows[layer])
        ctx.save_for_backward(q, k, v, out)
        ctx.scale, ctx.layer, ctx.recorder = scale, layer, recorder
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        recorder: InfluenceRecorder = ctx.recorder
        grads = _Backward(q, k, v, out, grad_out, ctx.scale, recorder.windows[ctx.layer])
        spans = _SpanSums(k.shape[1], k.shape[2], recorder.sink, recorder.block, q.device)
        for start in range(0, q.shape[2], grads.tile_rows(recorder.block)):
            weights, flows = grads.tile(start, recorder.block)
            spans.add(weights, flows)
        recorder.tables[ctx.layer] = spans.total
        return grads.dq.view_as(q), grads.dk, grads.dv, None, None, None


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    if window is None or window >= q.shape[2]:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    place = torch.arange(q.shape[2], device=q.device)
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


class _Backward:
    """Attention's backward pass, a tile of query rows against all their keys at a time.

    Keys run newest first inside a tile, so that distance grows along a row.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        grad_out: Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        batch, heads, length, dim = q.shape
        kv_heads = k.shape[1]
        grouped = (batch * kv_heads, heads // kv_heads, length, dim)
        self.q = q.reshape(grouped)
        self.grad_out = grad_out.reshape(grouped)
        self.delta = (self.grad_out.float() * out.reshape(grouped).float()).sum(-1, keepdim=True)
        self.keys = k.reshape(batch * kv_heads, length, dim).flip(1)
        self.values = v.reshape(batch * kv_heads, length, dim).flip(1)
        self.scale = scale
        self.window = window
        self.dq = torch.zeros_like(self.q)
        self.dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        self.dv = torch.zeros(v.shape, dtype=torch.float32, device=v.device)

    def tile_rows(self, block: int) -> int:
        """Rows of a tile: a multiple of `block` whose score matrix stays in cache."""
        per_row = self.q.shape[0] * self.q.shape[1] * self.q.shape[2]
        return max(1, _TILE_ELEMENTS // per_row // block) * block

    def tile(self, start: int, block: int) -> tuple[Tensor, Tensor]:
        """Weights A and flows A (G - dO . O) of one tile, `[K, G, R, keys]`, newest key first."""
        groups, share, length, dim = self.q.shape
        stop = min(start + self.tile_rows(block), length)
        rows = stop - start
        keys, values = self.keys[:, length - stop :], self.values[:, length - stop :]
        q = self.q[:, :, start:stop].reshape(groups, share * rows, dim)
        grad_out = self.grad_out[:, :, start:stop].reshape(groups, share * rows, dim)
        scores = (q @ keys.mT).float().view(groups, share, rows, stop).mul_(self.scale)
        self._mask(scores, rows)
        weights = scores.softmax(-1)
        flows = (grad_out @ values.mT).float().view(groups, share, rows, stop)
        flows.sub_(self.delta[:, :, start:stop]).mul_(weights)
        flat_flows = flows.view(groups, share * rows, stop).to(q.dtype)
        flat_weights = weights.view(groups, share * rows, stop).to(q.dtype)
        self.dq[:, :, start:stop] = (flat_flows @ keys).view(groups, share, rows, dim) * self.scale
        self._add(self.dk, (flat_flows.mT @ q).mul_(self.scale), stop)
        self._add(self.dv, flat_weights.mT @ grad_out, stop)
        return weights, flows

    def _mask(self, scores: Tensor, rows: int) -> None:
        # In column c of row r the key is c - (rows - 1 - r) tokens back.
        future = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).tril(-1).flip(0)
        scores[..., :rows].masked_fill_(future, float("-inf"))
        if self.window is not None and self.window < scores.shape[-1]:
            row = torch.arange(rows, device=scores.device)[:, None]
            column = torch.arange(scores.shape[-1], device=scores.device)
            scores.masked_fill_(column - (rows - 1 - row) >= self.window, float("-inf"))

    def _add(self, total: Tensor, part: Tensor, stop: int) -> None:
        total.view(part.shape[0], -1, part.shape[2])[:, :stop] += part.flip(1)


class _SpanSums:
    """Adds up the joint influence of every span, `[kv_heads, spans]`, tile by tile."""

    def __init__(
        self, kv_heads: int, length: int, sink: int, block: int, device: torch.device
    ) -> None:
        self.kv_heads, self.sink, self.block = kv_heads, sink, block
        spans = -(-length // block) + 1
        self.total = torch.zeros(kv_heads, spans, dtype=torch.float64, device=device)
        self.total[:, : sink // block + 1] = float("inf")

    def add(self, weights: Tensor, flows: Tensor) -> None:
        """Tiles `[K, G, R, keys]`, newest key first."""
        mass = self._beyond(weights)
        flow = self._beyond(flows)
        joint = -flow / (1 - mass).clamp_min(_LEAST_MASS_LEFT)
        change = joint.sum((1, 2), dtype=torch.float64)
        change = change.view(-1, self.kv_heads, change.shape[-1]).sum(0)
        first = self.sink // self.block + 1
        count = min(change.shape[-1] - 1, self.total.shape[1] - first)
        self.total[:, first : first + count] += change[:, 1 : 1 + count]

    def _beyond(self, tile: Tensor) -> Tensor:
        """Sums `[K, G, R, blocks]` over keys past the sink at least `b * block` tokens back."""
        *_, rows, keys = tile.shape
        blocks = -(-keys // self.block)
        pitch = rows + blocks * self.block
        padded = tile.new_zeros(*tile.shape[:-1], pitch)
        kept = max(keys - self.sink, 0)
        padded[..., :kept] = tile[..., :kept]
        # Stepping one element less per row lines the rows up by distance.
        strides = (*padded.stride()[:-2], pitch - 1, self.block, 1)
        by_distance = padded.as_strided(
            (*tile.shape[:-1], blocks, self.block), strides, padded.storage_offset() + rows - 1
        )
        return by_distance.sum(-1).flip(-1).cumsum(-1).flip(-1)
