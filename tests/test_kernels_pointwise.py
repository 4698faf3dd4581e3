"""Rotation, norms, the gated unit and the KV write, in the interpreter, against torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from interpreted import Interpreter, shape
from torch import Tensor
from torch.nn import functional as F

from moac_kernels.shape import KernelShape
from moac_kernels.tables import span_table
from moac_runtime.backends.torch.decoder import Rotation, _Norm
from moac_runtime.package.span import HeadSpan
from moac_runtime.package.spec import NormSpec


@pytest.fixture(scope="module")
def run() -> Iterator[Interpreter]:
    made = Interpreter()
    yield made
    made.close()


def angles(kernels: KernelShape, positions: Tensor) -> Tensor:
    half = kernels.head_dim // 2
    return positions[:, None].float() * 10000.0 ** -(torch.arange(half) / half)


def rotated(kernels: KernelShape, x: Tensor, positions: Tensor, norm: Tensor | None) -> Tensor:
    """As the decoder does it: `x` `[M, heads, D]`, `norm` `[heads, D]`."""
    if norm is not None:
        x = norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + kernels.norm_eps))
    angle = angles(kernels, positions)[:, None]
    cos, sin = angle.cos(), angle.sin()
    return Rotation(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))(x)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("qk_norm", [None, "head"])
def test_rope_rotates_queries_and_keys(
    run: Interpreter, head_dim: int, qk_norm: str | None
) -> None:
    torch.manual_seed(0)
    kernels = shape(2, 3, head_dim, qk_norm=qk_norm)
    positions = torch.tensor([0, 1, 700])
    qkv = torch.randn(3, 10, head_dim)
    q_norm, k_norm = torch.randn(head_dim), torch.randn(head_dim)
    norm = torch.cat([q_norm.expand(6, -1), k_norm.expand(2, -1)]) if qk_norm else None
    wanted = torch.cat([rotated(kernels, qkv[:, :8], positions, norm), qkv[:, 8:]], 1)
    angle = angles(kernels, positions)
    tensors = [qkv, angle.cos(), angle.sin(), q_norm, k_norm]
    run(kernels, "rope", "rope", [3, 2], tensors, HEAD_TILE=4)
    torch.testing.assert_close(qkv, wanted)


def test_rope_decode_writes_each_slot_once(run: Interpreter) -> None:
    torch.manual_seed(0)
    kernels = shape(2, 1, 16)
    heads = [HeadSpan(6, 2), HeadSpan(9, 0)]
    positions = torch.tensor([8, -1, 3], dtype=torch.int32)
    qkv = torch.randn(3, 6, 16)
    before = qkv.clone()
    keys = torch.zeros(3 * 15, 16)
    values = torch.zeros(3 * 15, 16)
    angle = angles(kernels, positions)
    spans = span_table(heads, 3)
    norm = torch.ones(16)
    tensors = [qkv, angle.cos(), angle.sin(), norm, norm, keys, values, spans, positions]
    run(kernels, "rope", "rope_decode", [3, 2], tensors, HEAD_TILE=4)

    turned = rotated(kernels, before[:, :4], positions, None)
    torch.testing.assert_close(qkv[[0, 2], :2], turned[[0, 2], :2])
    assert torch.equal(qkv[1], before[1])
    # row 0, place 8: slot 2 + (8 - 2) % 4 of six, and slot 8 of nine; row 2, place 3
    slots = {(0, 0): 4, (0, 1): 18 + 8, (2, 0): 12 + 3, (2, 1): 18 + 18 + 3}
    for (row, head), slot in slots.items():
        torch.testing.assert_close(keys[slot], turned[row, 2 + head])
        assert torch.equal(values[slot], before[row, 4 + head])
    others = [slot for slot in range(45) if slot not in slots.values()]
    assert not keys[others].any()
    assert not values[others].any()


NORMS: dict[str, dict[str, bool]] = {
    "plain": {},
    "one more": {"norm_plus_one": True},
    "centred": {"norm_centred": True},
    "centred, with a bias": {"norm_centred": True, "norm_bias": True},
    "plain, with a bias": {"norm_bias": True},
}


def normed(kernels: KernelShape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By the decoder of the torch backend."""
    kind = NormSpec(kernels.norm_eps, kernels.norm_plus_one, kernels.norm_centred)
    return _Norm(weight, kind, bias)(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hidden", [96, 64])
@pytest.mark.parametrize("kind", NORMS)
def test_norms_with_and_without_residual(
    run: Interpreter, kind: str, hidden: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    name = str(dtype).removeprefix("torch.")
    kernels = shape(hidden_size=hidden, dtype=name, **NORMS[kind])
    x, delta = (5 + torch.randn(3, hidden).to(dtype) for _ in range(2))
    weight, bias, post = (torch.randn(hidden).to(dtype) for _ in range(3))
    own = bias if kernels.norm_bias else None
    out = torch.empty(3, hidden, dtype=dtype)
    run(kernels, "pointwise", "norm", [3], [x, weight, bias, out])
    close(out, normed(kernels, x, weight, own))
    for post_norm, scale in ((False, 1.0), (True, 1.0), (False, 0.3), (True, 0.3)):
        changed = replace(kernels, post_norm=post_norm, residual_scale=scale)
        added = normed(kernels, delta, post, bias if own is not None else None)
        total = x + (added if post_norm else delta) * scale
        for normed_too in (False, True):
            summed, out = x.clone(), torch.full((3, hidden), 7.0, dtype=dtype)
            tensors = [summed, delta, post, bias, weight, bias, out]
            run(changed, "pointwise", "add_norm", [3], tensors, NORMED=normed_too)
            close(summed, total)
            wanted = (
                normed(kernels, total, weight, own) if normed_too else 7 * torch.ones_like(out)
            )
            close(out, wanted)


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal but for the order of sums; in float16 also for a rounding that it turned over."""
    few = {"rtol": 2e-3, "atol": 4e-3} if wanted.dtype == torch.float16 else {}
    torch.testing.assert_close(found, wanted, **few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "one more", "centred"])
def test_norms_of_queries_and_keys(run: Interpreter, kind: str, dtype: torch.dtype) -> None:
    """Of each head, then rotated; and across all heads of a token."""
    torch.manual_seed(0)
    name = str(dtype).removeprefix("torch.")
    for dim in (16, 80):
        kernels = shape(2, 3, dim, qk_norm="head", dtype=name, **NORMS[kind])
        qkv = (1 + torch.randn(3, 10, dim)).to(dtype)
        q_norm, k_norm = torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)
        weights = torch.cat([q_norm.expand(6, -1), k_norm.expand(2, -1)])
        positions = torch.tensor([0, 1, 30])
        angle = angles(kernels, positions)
        qk = normed(kernels, qkv[:, :8], weights, None)
        turned = rotated(kernels, qk.float(), positions, None)
        wanted = torch.cat([turned.to(dtype), qkv[:, 8:]], 1)
        tensors = [qkv, angle.cos(), angle.sin(), q_norm, k_norm]
        run(kernels, "rope", "rope", [3, 2], tensors, HEAD_TILE=4)
        close(qkv, wanted)

        kernels = replace(kernels, qk_norm="width")
        q_norm, k_norm = torch.randn(6 * dim).to(dtype), torch.randn(2 * dim).to(dtype)
        parts = qkv.clone().split([6, 2, 2], dim=1)
        queries = normed(kernels, parts[0].flatten(1), q_norm, None).view(parts[0].shape)
        keys = normed(kernels, parts[1].flatten(1), k_norm, None).view(parts[1].shape)
        run(kernels, "rope", "qk_norm", [3, 2], [qkv, q_norm, k_norm])
        close(qkv, torch.cat([queries, keys, parts[2]], dim=1))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_unit(run: Interpreter, activation: str) -> None:
    torch.manual_seed(0)
    functions = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
    }
    gate_up, out = 3 * torch.randn(2, 160), torch.empty(2, 80)
    kernels = shape(activation=activation)
    run(kernels, "pointwise", "act_mul", [2, 2], [gate_up, out], BLOCK=64)
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(out, functions[activation](gate) * up)
