"""Rotation, norms, the gated unit and the KV write, in the interpreter, against torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from interpreted import Interpreter, shape
from torch import Tensor
from torch.nn import functional as F

from moac_kernels.shape import KernelShape
from moac_kernels.tables import span_table
from moac_runtime.backends.torch.decoder import Rotation
from moac_runtime.package.span import HeadSpan


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
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rope_rotates_queries_and_keys(run: Interpreter, head_dim: int, qk_norm: bool) -> None:
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


@pytest.mark.parametrize("hidden", [96, 64])
def test_rms_norm_with_and_without_residual(run: Interpreter, hidden: int) -> None:
    torch.manual_seed(0)
    kernels = shape(hidden_size=hidden)
    x, delta, weight = torch.randn(3, hidden), torch.randn(3, hidden), torch.randn(hidden)
    out = torch.empty(3, hidden)
    run(kernels, "pointwise", "rms_norm", [3], [x, weight, out])
    torch.testing.assert_close(out, F.rms_norm(x, (hidden,), weight, kernels.norm_eps))
    total = x + delta
    run(kernels, "pointwise", "add_rms_norm", [3], [x, delta, weight, out])
    torch.testing.assert_close(x, total)
    torch.testing.assert_close(out, F.rms_norm(total, (hidden,), weight, kernels.norm_eps))


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
