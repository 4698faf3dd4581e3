"""Attention over spans in plain torch, for prefill and for decode.

Grouped queries are native: a KV head is read once for all its query heads and never repeated in
memory. Both paths end in torch's fused attention, which keeps its softmax in float32.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moac_runtime.backends.layout import Layout, Stretch
from moac_runtime.package.span import HeadSpan, visible

# Small enough that a narrow span's band is clipped well, large enough to keep the cores busy.
BLOCK = 128


@dataclass(frozen=True, slots=True)
class Block:
    """Some consecutive queries and all keys that any of them sees.

    `keys`: ascending slices of the keys; `mask`: additive `[queries, keys]`, None where every
    query sees every key.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None


def query_blocks(
    head: HeadSpan,
    start: int,
    count: int,
    keys: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> list[Block]:
    """Cut queries at positions `start` to `start + count - 1` into blocks with the keys they see.

    `keys`: the keys' positions, ascending. `dtype`, `device`: of the masks.
    """
    place = torch.tensor(keys, dtype=torch.int32, device=device)
    blocks = []
    for first in range(start, start + count, BLOCK):
        stop = min(first + BLOCK, start + count)
        slices = _seen(head, first, stop - 1, keys)
        query = torch.arange(first, stop, dtype=torch.int32, device=device)[:, None]
        mask = visible(query, torch.cat([place[part] for part in slices]), head)
        queries = slice(first - start, stop - start)
        blocks.append(Block(queries, slices, additive(mask, dtype)))
    return blocks


def _seen(head: HeadSpan, first: int, last: int, keys: Sequence[int]) -> tuple[slice, ...]:
    """The keys in sight of any query from `first` to `last`: the sinks and a band, or one run."""
    reach = head.size - head.sink
    oldest = 0 if head.window is None else first - head.window + 1
    sinks = slice(bisect_left(keys, oldest), bisect_left(keys, head.sink))
    band = slice(bisect_left(keys, max(first - reach + 1, oldest)), bisect_right(keys, last))
    if sinks.start >= sinks.stop:
        return (band,)
    if band.start <= sinks.stop:
        return (slice(sinks.start, band.stop),)
    return (sinks, band)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The mask as numbers to add to scores (fused attention is faster so), None if all is seen."""
    if bool(mask.all()):
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, float("-inf")
    )


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Sequence[Block],
    scale: float,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`q` `[g, G, T, D]`, `k` and `v` `[g, N, D]` under `blocks`; `[g, G, T, D]`.

    `sinks`: learned logits `[g, G]` that share in the softmax.
    """
    group = q.shape[1]
    if sinks is not None:
        sinks = sinks[:, :, None, None]
    k, v = k[:, None], v[:, None]
    parts = [
        _attention(
            q[:, :, block.queries],
            # a stride of nought: the group shares one key head without a copy
            _pick(k, block.keys).expand(-1, group, -1, -1),
            _pick(v, block.keys).expand(-1, group, -1, -1),
            block.mask,
            scale,
            cap,
            sinks,
        )
        for block in blocks
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of `q` `[..., T, D]` to `[..., N, D]`; fused where the scores are all there is.

    `sinks` `[..., T or 1, 1]`.
    """
    if cap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = capped((q @ k.mT).float() * scale, cap)
    scores = scores if mask is None else scores + mask
    return sunk_softmax(scores, sinks).to(v.dtype) @ v


def sunk_softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax of `scores` `[..., N]` with one logit more, whose own share is left out.

    `sinks`: that logit, `[..., 1]`; None is none.
    """
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]


def _pick(x: Tensor, keys: tuple[slice, ...]) -> Tensor:
    parts = [x[:, :, part] for part in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@dataclass(frozen=True, slots=True)
class DecodeView:
    """Where a row's new token goes, and which slots it then attends to.

    `slot`: of the token; `filled`: slots to read; `mask`: additive `[1, filled]`, None where all
    of them are seen.
    """

    slot: int
    filled: int
    mask: Tensor | None


def decode_view(
    layout: Layout, length: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> DecodeView:
    """The view of a step that adds one token to a row that was fed `length` tokens before."""
    filled, head = layout.filled(length + 1), layout.head
    mask = None
    # The ring holds just what is in sight. Under an own window, though, a sink goes out of sight
    # while it is held, and so does a token before a gap.
    if head.window is not None and (head.sink or layout.shift):
        places = slot_positions(layout.held(length + 1), filled, device)
        mask = additive(visible(length, places, head)[None], dtype)
    return DecodeView(layout.next_slot(length), filled, mask)


def slot_positions(
    stretches: Sequence[Stretch], slots: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The position in each of `slots` slots, `[slots]`, -1 where `stretches` say nothing."""
    found = torch.full((slots,), -1, device=device)
    for position, slot, count in stretches:
        found[slot : slot + count] = torch.arange(position, position + count, device=device)
    return found


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    view: DecodeView,
    scale: float,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query a head: `q` `[n, g, G, D]` over what rows hold, `[n, g, filled, D]`; as `q`.

    `sinks`: learned logits `[g, G]` that share in the softmax.
    """
    # the group stands in the query rows, so that each key is read once
    own = None if sinks is None else sinks[:, :, None]
    return _attention(q, keys, values, view.mask, scale, cap, own)


def capped(x: Tensor, cap: float | None) -> Tensor:
    """`cap tanh(x / cap)`, which stays within `cap`; `x` itself where there is none."""
    return x if cap is None else torch.tanh(x / cap) * cap
