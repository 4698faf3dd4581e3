"""The rows behind a cache of transformers, and one forward pass over them.

Every sequence of the batch is a row with rings of its own, as on the torch backend. Padding is
never stored and never seen: a row's tokens are counted without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from moac_runtime.backends.layout import HeadRun
from moac_runtime.backends.torch.cache import SpanCache
from moac_runtime.backends.torch.rounding import format_of
from moac_runtime.backends.torch.steps import Share, StepAttention
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.package.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Opened:
    """What all caches of an attached plan are made by.

    `number`: which attached plan it is. `runs[layer]`: its heads, in the checkpoint's order, in
    runs of equal spans at `capacity` tokens. `sink_logits[layer]`: `[H]`, None where a layer
    learned none. `key_orders[layer]`: how a package orders the numbers of a key, by which 4 bits
    rotate them.
    """

    number: int
    spec: ModelSpec
    capacity: int
    runs: Sequence[Sequence[HeadRun]]
    sink_logits: Sequence[Tensor | None]
    key_orders: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Fed:
    """What a forward pass is given: `batch` sequences of `count` new tokens, padding counted.

    `mask` `[batch, tokens]`: 0 for padding, None where there is none; `tokens` are all those that
    the cache has seen and the new ones. `positions` `[batch or 1, count]`: of the new tokens.
    """

    batch: int
    count: int
    mask: Tensor | None
    positions: Tensor | None


@dataclass(slots=True)
class PlanRow:
    """One sequence. `length`: tokens fed without padding; `layers[layer]`: its caches.

    `offset`: how far transformers' positions are ahead of the row's, None before the first token.
    """

    layers: list[list[SpanCache]]
    length: int = 0
    offset: int | None = None


class PlanRows:
    """The rows of one cache. `seen`: tokens that transformers has fed, padding counted.

    `running`: whether a forward pass over them has begun and not ended.
    """

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.rows: list[PlanRow] = []
        self.seen = 0
        self.running = False

    def clear(self) -> None:
        """Free all rows; the next forward pass makes new ones."""
        self.rows, self.seen, self.running = [], 0, False

    def begin(self, fed: Fed) -> ForwardPass:
        """The forward pass over these tokens; `finish` ends it.

        Raises UsageError for what a plan cannot run, MoacError where a row would pass its
        capacity; nothing has changed then.
        """
        if self.running:
            raise UsageError(
                "the last forward pass over this cache did not end, so it holds a part of it; "
                "call reset() on the cache, or go on with another"
            )
        rows = self.rows or [PlanRow([[] for _ in self.opened.runs]) for _ in range(fed.batch)]
        if len(rows) != fed.batch:
            raise UsageError(
                f"the cache holds {len(rows)} sequences and is fed {fed.batch}; feed all of them "
                "together, each time"
            )
        places = _real_places(fed, self.seen, rows)
        self._check_room(rows, places)
        given = _positions(fed, self.seen)
        offsets = [_offset(*parts) for parts in zip(rows, given, places, strict=True)]
        for row, offset in zip(rows, offsets, strict=True):
            row.offset = offset
        self.rows, self.running = rows, True
        return ForwardPass(self, fed, places)

    def finish(self, step: ForwardPass) -> None:
        """Count what a forward pass has fed."""
        for row, share in zip(self.rows, step.shares, strict=True):
            row.length += share.count
        self.seen += step.fed.count
        self.running = False

    def open_layer(self, layer: int, like: Tensor) -> None:
        """Make the caches of one layer, of the dtype and on the device of its keys."""
        for row in self.rows:
            if not row.layers[layer]:
                row.layers[layer] = [self._cache(run, like) for run in self.opened.runs[layer]]

    def _cache(self, run: HeadRun, like: Tensor) -> SpanCache:
        # no inference tensor: the next forward pass may run outside of torch.inference_mode
        with torch.inference_mode(False):
            dim, bits = self.opened.spec.head_dim, run.layout.head.bits
            return SpanCache(run, format_of(dim, like.dtype, bits), like.device)

    def _check_room(self, rows: Sequence[PlanRow], places: Sequence[Sequence[int]]) -> None:
        longest = max(row.length + len(real) for row, real in zip(rows, places, strict=True))
        if longest > self.opened.capacity:
            raise MoacError(
                f"the sequence would have {longest} tokens, but the plan is attached with a "
                f"capacity of {self.opened.capacity}; attach it with a larger one, or shorten the "
                "prompt or the answer"
            )


@dataclass(slots=True)
class ForwardPass:
    """One forward pass. `places[row]`: which of the row's new tokens are real, ascending."""

    rows: PlanRows
    fed: Fed
    places: Sequence[Sequence[int]]
    shares: list[Share] = field(init=False)
    _attention: StepAttention = field(init=False)
    _real: Tensor | None = None

    def __post_init__(self) -> None:
        opened = self.rows.opened
        ends = accumulate(map(len, self.places), initial=0)
        self.shares = [
            Share(row.layers, row.length, slice(first, stop))
            for row, (first, stop) in zip(self.rows.rows, pairwise(ends), strict=True)
        ]
        self._attention = StepAttention(self.shares, opened.spec, opened.sink_logits)
        if any(len(places) < self.fed.count for places in self.places):
            firsts = range(0, self.fed.batch * self.fed.count, self.fed.count)
            pairs = zip(firsts, self.places, strict=True)
            self._real = torch.tensor(
                [first + p for first, places in pairs for p in places], dtype=torch.long
            )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q` `[B, H, T, D]`, `k` and `v` `[B, K, T, D]`, rotated; `[B, T, H, D]`.

        What is padding comes out as noughts. Raises UsageError where gradients are wanted of keys
        and values that are rounded.
        """
        _check_gradients(self.rows.opened.runs[layer], k, v)
        self.rows.open_layer(layer, k)
        batch, heads, count, dim = q.shape
        if (order := self.rows.opened.key_orders[layer]) != list(range(dim)):
            q, k = q[..., order], k[..., order]
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        if self._real is None:
            return self._attention(layer, *flat).view(batch, count, heads, dim)
        real = self._real.to(q.device)
        out = torch.zeros_like(flat[0])
        out[real] = self._attention(layer, *(x[real] for x in flat))
        return out.view(batch, count, heads, dim)

    def finish(self) -> None:
        """Count what was fed."""
        self.rows.finish(self)


def _check_gradients(runs: Sequence[HeadRun], *tensors: Tensor) -> None:
    rounded = any(run.layout.head.bits is not None for run in runs)
    if rounded and any(tensor.requires_grad for tensor in tensors):
        raise UsageError(
            "keys and values in 8 or 4 bits have no gradient; run the model under "
            "torch.no_grad(), or attach a plan without widths"
        )


def _real_places(fed: Fed, seen: int, rows: Sequence[PlanRow]) -> list[Sequence[int]]:
    """Which of each row's new tokens are no padding. Raises UsageError for another mask."""
    if fed.mask is None:
        if any(row.length != seen for row in rows):
            raise UsageError(
                "the cache was fed padded sequences, and the attention mask is missing now; give "
                "the mask of all tokens, padding and new ones too"
            )
        return [range(fed.count)] * fed.batch
    wanted = (fed.batch, seen + fed.count)
    if tuple(fed.mask.shape) != wanted:
        raise UsageError(
            f"the attention mask has the shape {list(fed.mask.shape)}, and a plan runs with one "
            f"of {list(wanted)}, 0 for padding: spans say what is seen beside it; give that, or "
            "none"
        )
    held = (fed.mask[:, :seen] != 0).sum(1).tolist()
    if held != [row.length for row in rows]:
        raise UsageError(
            "the attention mask hides other tokens than it did when they were fed; keep what it "
            "says of them"
        )
    new: list[list[int]] = fed.mask[:, seen:].tolist()
    return [[place for place, real in enumerate(row) if real] for row in new]


def _positions(fed: Fed, seen: int) -> list[Sequence[int]]:
    """Each row's new positions, as transformers counts them. Raises UsageError for a shape."""
    if fed.positions is None:
        return [range(seen, seen + fed.count)] * fed.batch
    if tuple(fed.positions.shape) not in ((1, fed.count), (fed.batch, fed.count)):
        raise UsageError(
            f"position_ids has the shape {list(fed.positions.shape)}, expected "
            f"{[fed.batch, fed.count]}; give that, or leave it out"
        )
    found: list[Sequence[int]] = fed.positions.expand(fed.batch, -1).tolist()
    return found


def _offset(row: PlanRow, positions: Sequence[int], real: Sequence[int]) -> int | None:
    """The row's `offset` after this step. Raises UsageError for positions with gaps."""
    ahead = {positions[place] - row.length - i for i, place in enumerate(real)}
    if row.offset is not None:
        ahead.add(row.offset)
    if len(ahead) > 1:
        raise UsageError(
            "the positions of a sequence do not go up by one from token to token, which the spans "
            "of a plan count by; leave position_ids out, and pad on the left"
        )
    return ahead.pop() if ahead else None
