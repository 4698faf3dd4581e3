"""The oracle itself, held against loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch

from moac_kernels.reference import layer_mask, masked_attention


def test_equals_loops_over_single_queries() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 6, 5), torch.randn(2, 2, 6, 5)
    mask = torch.rand(2, 2, 3, 6) > 0.4
    mask[..., 0] = True
    out = masked_attention(q, k, v, mask, 0.3)
    for b in range(2):
        for h in range(4):
            for t in range(3):
                seen = [n for n in range(6) if mask[b, h // 2, t, n]]
                scores = [math.exp(0.3 * float(q[b, h, t] @ k[b, h // 2, n])) for n in seen]
                shares = [score / sum(scores) for score in scores]
                wanted = sum(s * v[b, h // 2, n] for s, n in zip(shares, seen, strict=True))
                torch.testing.assert_close(out[b, h, t], wanted)


def test_masks_broadcast_over_batch_and_heads() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    causal = torch.ones(3, 3).tril().bool()
    whole = masked_attention(q, k, v, causal.expand(2, 2, 3, 3), 1.0)
    for mask in (causal, causal.expand(2, 3, 3), causal.expand(1, 1, 3, 3)):
        torch.testing.assert_close(masked_attention(q, k, v, mask, 1.0), whole)


def test_low_precision_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 8).bfloat16() for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    out = masked_attention(q, k, v, mask, 1.0)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, masked_attention(q.float(), k.float(), v.float(), mask, 1.0))


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    out = masked_attention(q, k, k, mask, 1.0)
    assert out[0, 0, 1].tolist() == [0, 0, 0, 0]
    assert out[0, 0, 0].abs().sum() > 0


def test_layer_mask_asks_the_rule_for_each_head() -> None:
    place = torch.arange(4)
    mask = layer_mask(lambda query, key, head: query - key == head, place, place, 3)
    assert mask.shape == (3, 4, 4)
    for head in range(3):
        assert mask[head].nonzero().tolist() == [[i, i - head] for i in range(head, 4)]


def test_refuses_heads_that_do_not_divide() -> None:
    q, k = torch.randn(1, 3, 1, 4), torch.randn(1, 2, 1, 4)
    with pytest.raises(ValueError, match="multiple of KV heads, got 3, 2"):
        masked_attention(q, k, k, torch.ones(1, 1, dtype=torch.bool), 1.0)
