"""Keys and values in 8 and 4 bits: what is stored, to the bit, and how many bytes it takes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_rounding import (
    bfloat16_down,
    bfloat16_up,
    held,
    rotated,
    rounded,
    stored,
)

from moac_kernels import reference
from moac_runtime.backends.layout import head_runs
from moac_runtime.backends.torch.rounding import format_of
from moac_runtime.package.kv_format import KV_BITS, KvShape, rotation_block
from moac_runtime.package.plan import Plan, dense_plan
from moac_runtime.package.span import DENSE, HeadSpan, Rule

HEAD_DIMS = [4, 16, 20, 32, 64, 80, 96, 128, 256]
# away from nought: what underflows when it is divided by 127 is held as nought
NORMAL = st.floats(2.0**-99, 1e6, width=32) | st.floats(-1e6, -(2.0**-99), width=32)


def numbers(head_dim: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(head_dim)
    return (rng.standard_normal((*shape, head_dim)) * scale).astype(np.float32)


def hadamard(size: int) -> np.ndarray:
    """By its definition: the sign of an entry is the parity of the bits that both places share."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs) / math.sqrt(size)


# ---- what is stored


@given(st.floats(-(2.0**126), 2.0**126, width=32))
def test_bfloat16_is_rounded_up_and_down(x: float) -> None:
    number = np.array([x], np.float32)
    low, high = bfloat16_down(number), bfloat16_up(number)
    assert low <= number <= high
    for found in (low, high):
        assert found.view(np.uint32) & 0xFFFF == 0
    steps = int(abs(int(high.view(np.int32)[0]) - int(low.view(np.int32)[0])))
    assert steps == (0 if low == high else 1 << 16)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_rotation_is_hadamards_in_blocks_and_undoes_itself(head_dim: int) -> None:
    block = rotation_block(head_dim)
    assert head_dim % block == 0
    assert block <= 64
    assert (head_dim // block) % 2 or block == 64
    x = numbers(head_dim, 5, 3)
    wanted = x.reshape(5, 3, -1, block).astype(np.float64) @ hadamard(block)
    assert np.allclose(rotated(x), wanted.reshape(x.shape), atol=1e-5)
    assert np.allclose(rotated(rotated(x)), x, atol=1e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_8_bits_are_half_a_scale_away_at_most(head_dim: int, scale: float) -> None:
    x = numbers(head_dim, 50, 2, scale=scale)
    codes, scales = stored(x, 8)
    assert (codes.shape, scales.shape) == (x.shape, (50, 2, 1))
    assert codes.dtype == np.int8
    assert codes.min() >= -127
    found = held(codes, scales, head_dim)
    assert (abs(found - x) <= scales * np.float32(0.5001)).all()
    # the scale is the least bfloat16 that holds the largest number
    largest = abs(x).max(-1, keepdims=True)
    assert (scales * 127 >= largest * np.float32(0.9999999)).all()
    assert (scales * 127 <= largest * np.float32(1.008)).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_4_bits_are_half_a_scale_away_at_most_once_rotated(head_dim: int) -> None:
    x = numbers(head_dim, 50, 2)
    codes, scales = stored(x, 4)
    groups = -(-head_dim // 32)
    assert (codes.shape, scales.shape) == ((50, 2, head_dim // 2), (50, 2, groups, 2))
    assert codes.dtype == np.uint8
    wanted, found = rotated(x), held(codes, scales, head_dim)
    for group in range(groups):
        part = np.s_[..., 32 * group : 32 * (group + 1)]
        low, high = wanted[part].min(-1), wanted[part].max(-1)
        assert (scales[..., group, 1] <= low).all()
        assert (scales[..., group, 1] + 15 * scales[..., group, 0] >= high - 1e-6).all()
        limit = scales[..., group, 0, None] * np.float32(0.5001)
        assert (abs(found - wanted)[part] <= limit).all()
    assert np.allclose(rounded(x, 4), rotated(found))


@settings(deadline=None)
@given(st.sampled_from(HEAD_DIMS), NORMAL, st.sampled_from(KV_BITS))
def test_equal_numbers_and_noughts_need_no_special_reader(
    head_dim: int, value: float, bits: int
) -> None:
    x = np.full((2, head_dim), value, np.float32)
    x[1] = 0
    found = rounded(x, bits)
    assert np.isfinite(found).all()
    assert (found[1] == 0).all()
    limit = abs(value) / 127 if bits == 8 else abs(value) * math.sqrt(head_dim) / 15
    assert (abs(found[0] - value) <= limit).all()


def test_halves_go_to_the_even_number_and_low_nibbles_come_first() -> None:
    x = np.array([[127.0, 0.5, 1.5, -2.5]], np.float32)
    codes, scales = stored(x, 8)
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[127, 0, 2, -2]]
    turned = rotated(np.array([[0.0, 15.0, 3.0, 7.0]], np.float32))  # turned back when stored
    codes, scales = stored(turned, 4)
    assert scales.tolist() == [[[1.0, 0.0]]]
    assert codes.tolist() == [[0 | 15 << 4, 3 | 7 << 4]]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_stores_the_same_bits_and_reads_the_same_numbers(
    head_dim: int, bits: int, dtype: torch.dtype
) -> None:
    x = torch.from_numpy(numbers(head_dim, 3, 40, scale=3)).to(dtype)
    x[0, 0], x[0, 1], x[0, 2, 0] = 0, -2.3, 1000
    format = format_of(head_dim, dtype, bits)
    codes, scales = format.encoded(x)
    wanted_codes, wanted_scales = stored(x.float().numpy(), bits)
    assert codes.numpy().tobytes() == wanted_codes.tobytes()
    assert scales.dtype == torch.bfloat16
    assert (scales.float().numpy() == wanted_scales.reshape(3, 40, -1)).all()
    found = format.decoded((codes, scales))
    assert (found.numpy() == held(wanted_codes, wanted_scales, head_dim)).all()
    back = rounded(x.float().numpy(), bits)
    assert (format.turned(found).numpy() == back).all()
    assert (reference.rounded(x, bits).numpy() == back).all()  # the oracle, which shares no code


def test_stored_numbers_are_these_and_no_others() -> None:
    """A row computed by hand from docs/FORMAT.md, so that no backend and no reference drifts."""
    x = np.array([[3.0, -1.0, 0.25, 0.0]], np.float32)
    codes, scales = stored(x, 8)
    assert scales.tolist() == [[0.023681640625]]  # 3 / 127 = 0.02362204..., up to bfloat16
    assert codes.tolist() == [[127, -42, 11, 0]]
    codes, scales = stored(x, 4)
    # rotated: 1.125, 2.125, 0.875, 1.875, so m = 0.875 and s = 1.25 / 15 up to bfloat16
    assert scales.tolist() == [[[0.08349609375, 0.875]]]
    assert codes.tolist() == [[3 | 15 << 4, 0 | 12 << 4]]


# ---- how many bytes it takes


def test_bytes_of_a_token_at_every_width() -> None:
    kv = KvShape(64, 2)
    assert [kv.token_bytes(bits) for bits in (None, 8, 4)] == [256, 132, 80]
    assert KvShape(80, 2).token_bytes(4) == 2 * (40 + 12)
    assert KvShape(16, 4).token_bytes(4) == 2 * (8 + 4)


@given(st.sampled_from(HEAD_DIMS), st.integers(1, 3000), st.sampled_from([None, *KV_BITS]))
def test_a_head_takes_its_tokens_and_at_most_sixty_bytes_more(
    head_dim: int, size: int, bits: int | None
) -> None:
    kv = KvShape(head_dim, 2)
    exact = size * kv.token_bytes(bits)
    found = kv.head_bytes(HeadSpan(size, sink=0, bits=bits))
    assert exact <= found <= exact + (0 if bits is None else 60)
    assert bits is None or found % 32 == 0


@pytest.mark.parametrize("bits", [None, *KV_BITS])
def test_the_memory_of_a_run_is_its_heads_bytes(bits: int | None) -> None:
    kv, head = KvShape(80, 2), HeadSpan(37, sink=4, bits=bits)
    (run,) = head_runs([head] * 3)
    memory = run.memory(kv)
    assert memory.size == 3 * kv.head_bytes(head)
    starts = memory.keys, memory.key_scales, memory.values, memory.value_scales, memory.size
    assert starts == tuple(sorted(starts))
    assert memory.key_scales == 3 * memory.codes
    assert memory.value_scales - memory.values == 3 * memory.codes
    assert memory.size - memory.value_scales == 3 * memory.scales
    if bits is not None:
        assert all(start % 16 == 0 for start in (*starts, memory.codes, memory.scales))
        assert memory.codes >= 37 * kv.code_bytes(bits)
        assert memory.scales >= 37 * kv.scale_bytes(bits)


def test_heads_of_one_span_and_other_widths_lie_apart() -> None:
    full, eight = HeadSpan(64, sink=4), HeadSpan(64, sink=4, bits=8)
    assert [run.num_heads for run in head_runs([full, full, eight])] == [2, 1]


# ---- plans


def plan(*rules: Rule) -> Plan:
    return Plan((rules,), sink=16, block=16, min_span=32, windows=(None,))


def test_widths_are_written_where_they_are_named_alone() -> None:
    found = plan(DENSE, Rule(0, 0.5, 8), Rule(-16, 0.25, 4))
    data = json.loads(json.dumps(found.to_json()))
    assert data["rules"] == [[[0, 1.0], [0, 0.5, 8], [-16, 0.25, 4]]]
    assert Plan.from_json(data) == found
    assert found.rounds
    assert not found.undropping().rounds
    assert dense_plan(1, 2, sink=4, block=16, min_span=32, windows=(None,)).rounds is False


@pytest.mark.parametrize("bits", [16, 0, -8, 2])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits of a rule must be 8 or 4, or left out, got"):
        plan(Rule(0, 0.5, bits))
    with pytest.raises(ValueError, match="bits of a rule must be"):
        Plan.from_json(plan(DENSE).to_json() | {"rules": [[[0, 0.5, bits]]]})
    with pytest.raises(ValueError, match=r"\[alpha, beta, bits\]"):
        Plan.from_json(plan(DENSE).to_json() | {"rules": [[[0, 0.5, 8, 1]]]})


def test_density_counts_tokens_and_the_byte_share_counts_bytes() -> None:
    kv = KvShape(64, 2)
    found = plan(DENSE, replace(DENSE, bits=8))
    assert found.density(1024) == 1
    assert found.held_bytes(1024, kv) == 1024 * (256 + 132)
    assert found.dense_bytes(1024, kv) == 2 * 1024 * 256
    assert found.byte_share(1024, kv) == (256 + 132) / 512
    assert plan(DENSE, Rule(0, 0.5)).byte_share(1024, kv) == 0.75
    assert plan(DENSE, Rule(0, 0.5)).byte_share(1000, kv) == plan(DENSE, Rule(0, 0.5)).density(
        1000
    )
