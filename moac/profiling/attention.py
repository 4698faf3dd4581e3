"""Causal attention whose backward pass also measures what masking each span would cost.

First-order influence in its joint form. Row i attends with weights A_ij; a candidate span masks
the set M_i of keys, of mass m_i. Renormalised, the output moves by
`-(1 / (1 - m_i)) * sum_{j in M_i} A_ij (V_j - O_i)`, so the loss moves by

    -(1 / (1 - m_i)) * sum_{j in M_i} A_ij (G_ij - dO_i . O_i),    G_ij = dO_i . V_j.

`A_ij (G_ij - dO_i . O_i)` is what flash attention's backward calls dS, so influence costs two
block sums on tiles the backward pass computes anyway, and no N x N matrix is kept.
MoA (arXiv 2406.14909, section 4.2) gives the single-entry form; the joint form counts a whole set.

Around a plan, rather than the dense model, row i attends to what its head's span leaves, of mass
`l_i`, with weights `A_ij / l_i`. Setting the span to another one drops a set of keys, or takes one
in: the same formula, with those weights and the mass taken in counted negative.

A learned logit beside the scores is one key more that no span drops, whose value is nought: it has
its share of every softmax, and of `l_i`, and no other part in any of these sums.

Holding keys and values in fewer bits moves them by what rounding does, `Q(K) - K` and
`Q(V) - V`, and the loss to the first order by

    sum_ij dS_ij scale (q_i . (Q(K_j) - K_j)) + A_ij (dO_i . (Q(V_j) - V_j)),

which is added up by distance too: a span is charged for the keys that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moac_kernels.reference import rounded_heads

TILE_ELEMENTS = 1 << 21
_FORWARD_ROWS = 256
_LEAST_MASS_LEFT = 1e-3


@dataclass(slots=True)
class InfluenceRecorder:
    """Collects one table `[kv_heads, spans]` per layer during a backward pass.

    Entry `s` of a table is the loss change, in nats, of giving that KV head a span of
    `s * block` tokens, `sink` of them pinned; spans at or under the sink are infinite.
    `windows[layer]` is the checkpoint's own sliding window in tokens, or None. `held[layer]`: the
    tokens that each KV head holds, a multiple of `block`, in the plan around which is measured;
    None is the dense model. `widths`: those that keys and values are rounded to for a table
    `[kv_heads, spans]` each in `rounding[layer]`; `key_orders[layer]`: how a package orders the
    numbers of a key.
    """

    sink: int
    block: int
    windows: tuple[int | None, ...]
    held: Sequence[Sequence[int]] | None = None
    widths: Sequence[int] = ()
    key_orders: Sequence[Sequence[int]] | None = None
    tables: dict[int, Tensor] = field(default_factory=dict)
    rounding: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sink % self.block:
            raise ValueError(f"sink must be a multiple of block, got {self.sink}, {self.block}")

    def reach(self, layer: int) -> _Reach:
        """What the heads of `layer` see while the influence is measured."""
        held = None if self.held is None else tuple(n - self.sink for n in self.held[layer])
        return _Reach(self.sink, self.windows[layer], held)

    def errors(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What rounding `k` and `v` `[B, K, T, D]` to each width moves them by."""
        order = None if self.key_orders is None else self.key_orders[layer]
        every = [[bits] * k.shape[1] for bits in self.widths]
        return [
            (rounded_heads(k, bits, order) - k.float(), rounded_heads(v, bits) - v.float())
            for bits in every
        ]


@dataclass(frozen=True, slots=True)
class _Reach:
    """The keys a layer's heads see: those of the last `window` tokens, and of those the first
    `sink` and, head by head, the last `recent`; None is all."""

    sink: int
    window: int | None
    recent: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class _Scoring:
    """Products of queries and keys become scores by a factor, then by `cap tanh(score / cap)`.

    `sinks` `[H]`: a logit of each query head that stands in its softmax beside the scores.
    """

    scale: float
    cap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether fused attention computes it."""
        return self.cap is None and self.sinks is None

    def of_heads(self, kv_heads: int) -> list[_Scoring]:
        """That of each KV head."""
        if self.sinks is None:
            return [self] * kv_heads
        return [replace(self, sinks=own) for own in self.sinks.chunk(kv_heads)]

    def grouped_sinks(self, kv_heads: int) -> Tensor | None:
        """`[K, G, 1, 1]`."""
        return None if self.sinks is None else self.sinks.view(kv_heads, -1, 1, 1)

    def of(self, products: Tensor) -> Tensor:
        """The scores, in place of the products where they have no cap."""
        scores = products.mul_(self.scale)
        return scores if self.cap is None else scores.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, scores: Tensor) -> Tensor | None:
        """How fast scores grow with what is capped, None where nothing is."""
        return None if self.cap is None else 1 - (scores / self.cap).square()


def influence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    layer: int,
    recorder: InfluenceRecorder,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention `[B, H, T, D]` over `[B, K, T, D]` that records influence on backward.

    `cap`: scores become `cap tanh(score / cap)`. `sinks` `[H]`: a learned logit of each head that
    stands in its softmax beside the scores. No gradient goes to it.
    """
    scoring = _Scoring(scale, cap, sinks)
    out: Tensor = _InfluenceAttention.apply(q, k, v, scoring, layer, recorder)  # type: ignore[no-untyped-call]
    return out


class _InfluenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scoring: _Scoring,
        layer: int,
        recorder: InfluenceRecorder,
    ) -> Tensor:
        out = _attention(q, k, v, scoring, recorder.reach(layer))
        ctx.save_for_backward(q, k, v, out)
        ctx.scoring, ctx.layer, ctx.recorder = scoring, layer, recorder
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        recorder: InfluenceRecorder = ctx.recorder
        reach = recorder.reach(ctx.layer)
        grads = _Backward(q, k, v, out, grad_out, ctx.scoring, reach)
        spans = _SpanSums(k.shape[1], k.shape[2], reach, recorder.block, q.device)
        errors = [grads.turned(*pair) for pair in recorder.errors(ctx.layer, k, v)]
        rounding = [spans.zeros() for _ in errors]
        for start in range(0, q.shape[2], grads.tile_rows(recorder.block)):
            tile = grads.tile(start, recorder.block)
            spans.add(tile.weights, tile.flows, tile.left)
            for total, pair in zip(rounding, errors, strict=True):
                spans.add_held(total, grads.moved(tile, *pair))
        recorder.tables[ctx.layer] = spans.total
        if rounding:
            recorder.rounding[ctx.layer] = torch.stack(rounding)
        return grads.dq.view_as(q), grads.dk, grads.dv, None, None, None


def _attention(q: Tensor, k: Tensor, v: Tensor, scoring: _Scoring, reach: _Reach) -> Tensor:
    if reach.recent is None:
        return _causal_attention(q, k, v, scoring, reach.window)
    share = q.shape[1] // k.shape[1]
    own = scoring.of_heads(k.shape[1])
    heads = zip(q.split(share, 1), k.split(1, 1), v.split(1, 1), reach.recent, own, strict=True)
    return torch.cat([_spanned_attention(*head, reach) for head in heads], dim=1)


def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scoring: _Scoring, window: int | None
) -> Tensor:
    length = q.shape[2]
    if scoring.plain and (window is None or window >= length):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scoring.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return _seen_attention(q, k, v, scoring, window, length if window is None else window, 0)


def _spanned_attention(
    q: Tensor, k: Tensor, v: Tensor, recent: int, scoring: _Scoring, reach: _Reach
) -> Tensor:
    """One KV head's attention to the sink and the last `recent` tokens."""
    if recent >= q.shape[2] - reach.sink:
        return _causal_attention(q, k, v, scoring, reach.window)
    return _seen_attention(q, k, v, scoring, reach.window, recent, reach.sink)


def _seen_attention(
    q: Tensor, k: Tensor, v: Tensor, scoring: _Scoring, window: int | None, recent: int, sink: int
) -> Tensor:
    """Rows by parts, each against the sink and the newest keys that any of its rows sees."""
    positions = torch.arange(q.shape[2], device=q.device)
    parts = []
    for rows in positions.split(_FORWARD_ROWS):
        first, stop = int(rows[0]), int(rows[-1]) + 1
        oldest = max(0, first - recent + 1)
        keys = torch.cat([positions[: min(sink, oldest)], positions[oldest:stop]])
        distance = rows[:, None] - keys
        seen = (distance >= 0) & ((distance < recent) | (keys < sink))
        if window is not None:
            seen &= distance < window
        parts.append(_masked(q[:, :, first:stop], k[:, :, keys], v[:, :, keys], seen, scoring))
    return torch.cat(parts, dim=2)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scoring: _Scoring) -> Tensor:
    """Attention of `q` `[B, H, R, D]` to the keys `[B, K, N, D]` that `seen` `[R, N]` says; fused
    where the softmax is of plain scores."""
    if scoring.plain:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scoring.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = scoring.of((grouped @ k[:, :, None].mT).float()).masked_fill_(~seen, float("-inf"))
    weights, _ = _softmax(scores, scoring.grouped_sinks(k.shape[1]))
    return (weights.to(v.dtype) @ v[:, :, None]).flatten(1, 2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The softmax of float32 `scores` `[..., N]` and of one logit more, `[..., 1]`, if any.

    Second: that logit's own share `[..., 1]`.
    """
    if sinks is None:
        return scores.softmax(-1), None
    column = sinks.float().expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, column], dim=-1).softmax(-1)
    return weights[..., :-1].contiguous(), weights[..., -1:]


class _Tile(NamedTuple):
    """Rows `start` to `stop - 1`: weights A and flows A (G - dO . O), `[K, G, R, keys]`, newest
    key first. `left` `[K, G, R, 1]`: around a plan the mass that the spans leave of A. `slope`:
    how fast scores grow with what is capped, None where nothing is.
    """

    start: int
    stop: int
    weights: Tensor
    flows: Tensor
    left: Tensor | None
    slope: Tensor | None


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
        scoring: _Scoring,
        reach: _Reach,
    ) -> None:
        batch, heads, length, dim = q.shape
        kv_heads = k.shape[1]
        grouped = (batch * kv_heads, heads // kv_heads, length, dim)
        self.q = q.reshape(grouped)
        self.grad_out = grad_out.reshape(grouped)
        self.delta = (self.grad_out.float() * out.reshape(grouped).float()).sum(-1, keepdim=True)
        self.keys = k.reshape(batch * kv_heads, length, dim).flip(1)
        self.values = v.reshape(batch * kv_heads, length, dim).flip(1)
        self.scoring = scoring
        own = scoring.grouped_sinks(kv_heads)
        self.sinks = None if own is None else own.repeat(batch, 1, 1, 1)
        self.window, self.sink = reach.window, reach.sink
        recent = reach.recent
        self.recent = None if recent is None else torch.tensor(recent, device=q.device)
        self.dq = torch.zeros_like(self.q)
        self.dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        self.dv = torch.zeros(v.shape, dtype=torch.float32, device=v.device)

    def tile_rows(self, block: int) -> int:
        """Rows of a tile: a multiple of `block` whose score matrix stays in cache."""
        per_row = self.q.shape[0] * self.q.shape[1] * self.q.shape[2]
        return max(1, TILE_ELEMENTS // per_row // block) * block

    def turned(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Errors of keys and values `[B, K, T, D]` as tiles take them, newest first."""
        shape = self.keys.shape
        own, others = (x.reshape(shape).flip(1).to(self.q.dtype) for x in (keys, values))
        return own, others

    def moved(self, tile: _Tile, keys: Tensor, values: Tensor) -> Tensor:
        """How the loss moves with errors of keys and values, pair by pair, `[K, G, R, keys]`."""
        groups, share, length, dim = self.q.shape
        rows, newest = tile.stop - tile.start, length - tile.stop
        flat = (groups, share * rows, dim)
        q = self.q[:, :, tile.start : tile.stop].reshape(flat)
        grad_out = self.grad_out[:, :, tile.start : tile.stop].reshape(flat)
        scores = (q @ keys[:, newest:].mT).float().view_as(tile.flows).mul_(self.scoring.scale)
        if tile.slope is not None:
            scores = scores * tile.slope
        moved = scores * tile.flows
        moved += (grad_out @ values[:, newest:].mT).float().view_as(moved) * tile.weights
        return moved if tile.left is None else moved / tile.left

    def tile(self, start: int, block: int) -> _Tile:
        """One tile, and the gradients that it adds."""
        groups, share, length, dim = self.q.shape
        stop = min(start + self.tile_rows(block), length)
        rows = stop - start
        keys, values = self.keys[:, length - stop :], self.values[:, length - stop :]
        q = self.q[:, :, start:stop].reshape(groups, share * rows, dim)
        grad_out = self.grad_out[:, :, start:stop].reshape(groups, share * rows, dim)
        scores = self.scoring.of((q @ keys.mT).float().view(groups, share, rows, stop))
        slope = self.scoring.slope(scores)
        self._mask(scores, rows)
        weights, sunk = _softmax(scores, self.sinks)
        flows = (grad_out @ values.mT).float().view(groups, share, rows, stop)
        flows.sub_(self.delta[:, :, start:stop]).mul_(weights)
        near, near_flows, left = weights, flows, None
        if self.recent is not None:
            dropped = self._dropped(self.recent, rows, stop)
            near, near_flows = weights.masked_fill(dropped, 0), flows.masked_fill(dropped, 0)
            left = near.sum(-1, keepdim=True)
            left = (left if sunk is None else left + sunk).clamp_min_(_LEAST_MASS_LEFT**2)
            flat_left = left.view(groups, share * rows, 1)
            q, grad_out = (q / flat_left).to(q.dtype), (grad_out / flat_left).to(q.dtype)
        if slope is not None:
            near_flows = near_flows * slope
        flat_flows = near_flows.view(groups, share * rows, stop).to(q.dtype)
        flat_weights = near.view(groups, share * rows, stop).to(q.dtype)
        dq = (flat_flows @ keys).view(groups, share, rows, dim) * self.scoring.scale
        self.dq[:, :, start:stop] = dq if left is None else dq / left
        self._add(self.dk, (flat_flows.mT @ q).mul_(self.scoring.scale), stop)
        self._add(self.dv, flat_weights.mT @ grad_out, stop)
        return _Tile(start, stop, weights, flows, left, slope)

    def _dropped(self, recent: Tensor, rows: int, keys: int) -> Tensor:
        """Keys that the spans leave out, `[K, 1, R, keys]`."""
        row = torch.arange(rows, device=recent.device)[:, None]
        column = torch.arange(keys, device=recent.device)
        far = column - (rows - 1 - row) >= recent[:, None, None, None]
        dropped = far & (column < keys - self.sink)
        return dropped.repeat(self.q.shape[0] // len(recent), 1, 1, 1)

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
        self, kv_heads: int, length: int, reach: _Reach, block: int, device: torch.device
    ) -> None:
        self.kv_heads, self.sink, self.block = kv_heads, reach.sink, block
        self.recent = reach.recent
        spans = -(-length // block) + 1
        self.total = torch.zeros(kv_heads, spans, dtype=torch.float64, device=device)
        self.total[:, : self.sink // block + 1] = float("inf")

    def add(self, weights: Tensor, flows: Tensor, left: Tensor | None) -> None:
        """Tiles `[K, G, R, keys]`, newest key first, and the mass `[K, G, R, 1]` that is left."""
        mass, flow = self._beyond(weights), self._beyond(flows)
        if left is None:
            joint = -flow / (1 - mass).clamp_min(_LEAST_MASS_LEFT)
        else:
            joint = self._around(mass / left, flow / left)
        change = joint.sum((1, 2), dtype=torch.float64)
        change = change.view(-1, self.kv_heads, change.shape[-1]).sum(0)
        first = self.sink // self.block + 1
        count = min(change.shape[-1] - 1, self.total.shape[1] - first)
        self.total[:, first : first + count] += change[:, 1 : 1 + count]

    def zeros(self) -> Tensor:
        """A table of no effect, `[kv_heads, spans]`."""
        return torch.zeros_like(self.total)

    def add_held(self, total: Tensor, moved: Tensor) -> None:
        """Add to `total` what every span holds of the effects `moved` `[K, G, R, keys]`."""
        far = self._beyond(moved).sum((1, 2), dtype=torch.float64)
        far = far.view(-1, self.kv_heads, far.shape[-1]).sum(0)
        whole = moved.sum((1, 2, 3), dtype=torch.float64).view(-1, self.kv_heads).sum(0)
        first = self.sink // self.block + 1
        count = min(far.shape[-1] - 1, total.shape[1] - first)
        total[:, first:] += whole[:, None]
        total[:, first : first + count] -= far[:, 1 : 1 + count]

    def _around(self, mass: Tensor, flow: Tensor) -> Tensor:
        """What each span loses against all keys, seen from the present spans."""
        mass_now, flow_now = self._now(mass), self._now(flow)
        joint = -(flow - flow_now) / (1 + mass_now - mass).clamp_min(_LEAST_MASS_LEFT)
        return joint - flow_now / (1 + mass_now)

    def _now(self, beyond: Tensor) -> Tensor:
        """What lies beyond each head's present span, `[K, G, R, 1]`."""
        found = F.pad(beyond, (0, 1))  # beyond a span that holds the tile's keys lies nothing
        last = found.shape[-1] - 1
        blocks = [min(recent // self.block, last) for recent in self.recent or ()]
        index = torch.tensor(blocks, device=beyond.device).repeat(len(found) // len(blocks))
        return found.gather(-1, index.view(-1, 1, 1, 1).expand(*found.shape[:-1], 1))

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
