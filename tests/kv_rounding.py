"""The reference of rounded keys and values, in numpy: every backend stores the same bits.

docs/FORMAT.md ("Keys and values in 8 and 4 bits") says the same in words. Fast paths have their
own code and are tested against this.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moac_runtime.package.kv_format import GROUP, groups, rotation_block

Floats: TypeAlias = NDArray[np.float32]
Codes: TypeAlias = NDArray[np.int8] | NDArray[np.uint8]


def rotated(x: Floats) -> Floats:
    """The orthonormal Hadamard rotation of `x` `[..., D]` in blocks; it undoes itself.

    Sums are taken pair by pair, over strides of 1, 2, 4 and so on, and scaled once at the end, so
    that their bits are the same wherever they are computed.
    """
    block, stride = rotation_block(x.shape[-1]), 1
    x = x.astype(np.float32)
    while stride < block:
        pairs = x.reshape(-1, 2, stride)
        x = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), axis=1).reshape(
            x.shape
        )
        stride *= 2
    return x * np.float32(block**-0.5)


def stored(x: Floats, bits: int) -> tuple[Codes, Floats]:
    """The codes and scales of keys or values `x` `[..., D]`, which are finite.

    8 bits: int8 `[..., D]` and scales `[..., 1]`. 4 bits: uint8 `[..., D / 2]`, and
    `[..., groups, 2]`, scale and minimum of each group. Scales are bfloat16 numbers.
    """
    return _stored8(x.astype(np.float32)) if bits == 8 else _stored4(rotated(x))


def held(codes: Codes, scales: Floats, head_dim: int) -> Floats:
    """What codes and scales stand for, `[..., D]`; of 4 bits it is the rotated key or value."""
    if codes.dtype == np.int8:
        return codes.astype(np.float32) * scales
    numbers = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], -1)
    per_number = np.repeat(scales, GROUP, axis=-2)[..., :head_dim, :]
    return numbers[..., :head_dim] * per_number[..., 0] + per_number[..., 1]


def rounded(x: Floats, bits: int) -> Floats:
    """What is left of keys or values `x` `[..., D]` once they were stored, not rotated."""
    found = held(*stored(x, bits), x.shape[-1])
    return found if bits == 8 else rotated(found)


def bfloat16_up(x: Floats) -> Floats:
    """The least bfloat16 number that is not below `x`."""
    return -bfloat16_down(-x)


def bfloat16_down(x: Floats) -> Floats:
    """The largest bfloat16 number that is not above `x`."""
    raw = np.ascontiguousarray(x, np.float32).view(np.uint32)
    away = np.where(raw >> 31, np.uint32(0xFFFF), np.uint32(0))
    return ((raw + away) & np.uint32(0xFFFF0000)).view(np.float32)


def _stored8(x: Floats) -> tuple[Codes, Floats]:
    scale = bfloat16_up(np.abs(x).max(-1, keepdims=True) / np.float32(127))
    return np.rint(_over(x, scale)).astype(np.int8), scale


def _stored4(x: Floats) -> tuple[Codes, Floats]:
    head_dim = x.shape[-1]
    # a shorter last group repeats its last number, which changes neither of its ends
    short = groups(head_dim) * GROUP - head_dim if head_dim > GROUP else 0
    wide = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)], mode="edge")
    grouped = wide.reshape(*x.shape[:-1], groups(head_dim), -1)
    low = bfloat16_down(grouped.min(-1, keepdims=True))
    scale = bfloat16_up((grouped.max(-1, keepdims=True) - low) / np.float32(15))
    codes = np.rint(_over(grouped - low, scale)).astype(np.uint8).reshape(wide.shape)
    codes = codes[..., :head_dim]
    if head_dim % 2:
        codes = np.pad(codes, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return packed.astype(np.uint8), np.concatenate((scale, low), axis=-1)


def _over(x: Floats, scale: Floats) -> Floats:
    """`x / scale`, nought where the scale is."""
    return np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
