"""The oracle: dense masked attention in float32, as plain as it can be written.

Tests and verification call this file; no fast path does. The mask comes from the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


def rounded(x: Tensor, bits: int | None) -> Tensor:
    """What keys or values `x` `[..., D]` stand for once a cache held them in 8 or 4 bits.

    docs/FORMAT.md, "Keys and values in 8 and 4 bits"; None is unrounded. Of 4 bits the rotation
    is undone, so that queries and outputs need none. Returns float32.
    """
    if bits is None:
        return x.float()
    if bits == 8:
        scale = _bfloat16_up(x.float().abs().amax(-1, keepdim=True) / 127)
        return torch.where(scale > 0, x.float() / scale, 0.0).round() * scale
    parts = [_rounded_group(group) for group in _rotated(x.float()).split(32, dim=-1)]
    return _rotated(torch.cat(parts, dim=-1))


def rounded_heads(
    x: Tensor, bits: Sequence[int | None], order: Sequence[int] | None = None
) -> Tensor:
    """Keys or values `x` `[B, K, N, D]` with the width of each KV head, in float32.

    `order[place]`: the number of a head that a package has at that place, None where that is its
    own: rotations and groups are of the package's order.
    """
    if all(width is None for width in bits):
        return x.float()
    if order is not None:
        there = torch.tensor(order, device=x.device)
        return rounded_heads(x[..., there], bits)[..., there.argsort()]
    return torch.stack([rounded(x[:, head], width) for head, width in enumerate(bits)], dim=1)


def _rounded_group(x: Tensor) -> Tensor:
    low = -_bfloat16_up(-x.amin(-1, keepdim=True))
    scale = _bfloat16_up((x.amax(-1, keepdim=True) - low) / 15)
    return torch.where(scale > 0, (x - low) / scale, 0.0).round() * scale + low


def _rotated(x: Tensor) -> Tensor:
    """By Hadamard matrices over blocks of numbers; sums in the order that the page gives."""
    block = math.gcd(x.shape[-1], 64)
    for stride in (2**power for power in range(block.bit_length() - 1)):
        pairs = x.reshape(*x.shape[:-1], -1, 2, stride)
        low, high = pairs.unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).reshape(x.shape)
    return x * torch.tensor(block, dtype=torch.float64).rsqrt().float()


def _bfloat16_up(x: Tensor) -> Tensor:
    """The least bfloat16 number that is not below `x`, in float32."""
    near = x.bfloat16().float()
    after = torch.nextafter(near.bfloat16(), torch.tensor(float("inf")).bfloat16()).float()
    return torch.where(near < x, after, near)


def layer_mask(
    sees: Callable[[Tensor, Tensor, int], Tensor], queries: Tensor, keys: Tensor, num_kv_heads: int
) -> Tensor:
    """A layer's mask `[K, T, N]` from the rule `sees(query, key, kv_head)`.

    `queries` `[T]` and `keys` `[N]` are positions; `sees` gets them as `[T, 1]` and `[1, N]`.
    """
    return torch.stack([sees(queries[:, None], keys[None, :], h) for h in range(num_kv_heads)])
