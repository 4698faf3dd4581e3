"""The oracle: dense masked attention in float32, as plain as it can be written.

Tests and verification call this file; no fast path does. The mask comes from the caller.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    cap: float | None = None,
    *,
    sinks: Tensor | None = None,
) -> Tensor:
    """Grouped-query attention under a dense mask, computed and returned in float32.

    `q` `[B, H, T, D]`; `k`, `v` `[B, K, N, D]`, query heads `h * H/K` onward belong to KV head
    `h`; `visible` bool, broadcastable to `[B, K, T, N]`. With a `cap` scores become
    `cap tanh(score / cap)`. `sinks` `[H]`: a logit of each head that stands in its softmax beside
    the scores, whatever is visible. Returns `[B, H, T, D]`; a query that sees nothing gives zeros.
    Raises ValueError where `H` is no multiple of `K`.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {heads}, {kv_heads}")
    grouped = q.float().reshape(q.shape[0], kv_heads, heads // kv_heads, *q.shape[2:])
    scores = torch.einsum("bkgtd,bknd->bkgtn", grouped, k.float()) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = scores.masked_fill(~visible.unsqueeze(-3), float("-inf"))
    if sinks is not None:
        column = sinks.float().reshape(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]]
    return torch.einsum("bkgtn,bknd->bkgtd", weights, v.float()).flatten(1, 2)


def layer_mask(
    sees: Callable[[Tensor, Tensor, int], Tensor], queries: Tensor, keys: Tensor, num_kv_heads: int
) -> Tensor:
    """A layer's mask `[K, T, N]` from the rule `sees(query, key, kv_head)`.

    `queries` `[T]` and `keys` `[N]` are positions; `sees` gets them as `[T, 1]` and `[1, N]`.
    """
    return torch.stack([sees(queries[:, None], keys[None, :], h) for h in range(num_kv_heads)])
