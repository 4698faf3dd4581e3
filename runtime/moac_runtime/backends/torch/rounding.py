"""How a cache's tensors hold keys and values: as they are, or rounded to 8 or 4 bits.

docs/FORMAT.md ("Keys and values in 8 and 4 bits") says what rounding is. Attention over rounded
keys is computed in float32, whatever the engine's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moac_runtime.backends.layout import HeadRun
from moac_runtime.package.kv_format import GROUP, KvShape, groups, rotation_block

Parts = tuple[Tensor, ...]
"""Keys or values of some heads as they are held: each part `[..., slots, width]`."""


class Format(Protocol):
    """How keys and values of heads are held. `dtype`: of what attention reads."""

    dtype: torch.dtype

    def empty(self, run: HeadRun, device: torch.device | str) -> Parts:
        """Parts for all slots of a run, `[heads, size, width]` each, not filled."""

    def encoded(self, x: Tensor) -> Parts:
        """What is held of keys or values `x` `[..., D]`."""

    def decoded(self, parts: Sequence[Tensor]) -> Tensor:
        """What is held, as attention reads it, `[..., D]`."""

    def turned(self, x: Tensor) -> Tensor:
        """Queries `[..., D]` as they meet decoded keys; also a mean of decoded values, turned
        back."""


class Plain:
    """Numbers of `dtype` as they are."""

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._head_dim = head_dim

    def empty(self, run: HeadRun, device: torch.device | str) -> Parts:
        """See `Format`."""
        shape = (run.num_heads, run.layout.head.size, self._head_dim)
        return (torch.empty(shape, dtype=self.dtype, device=device),)

    def encoded(self, x: Tensor) -> Parts:
        """See `Format`."""
        return (x,)

    def decoded(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Format`."""
        return parts[0]

    def turned(self, x: Tensor) -> Tensor:
        """See `Format`."""
        return x


class Coded:
    """Codes and bfloat16 scales, each in memory of the planned bytes."""

    dtype = torch.float32

    def __init__(self, head_dim: int, bits: int) -> None:
        self._head_dim, self._bits = head_dim, bits

    def empty(self, run: HeadRun, device: torch.device | str) -> Parts:
        """See `Format`."""
        kv, size = KvShape(self._head_dim, itemsize=0), run.layout.head.size

        def part(padded: int, width: int) -> Tensor:
            memory = torch.empty(run.num_heads, padded, dtype=torch.uint8, device=device)
            used: Tensor = memory[:, : size * width]
            return used.view(run.num_heads, size, width)

        codes = part(kv.codes(size, self._bits), kv.code_bytes(self._bits))
        scales = part(kv.scales(size, self._bits), kv.scale_bytes(self._bits))
        own = codes.view(torch.int8) if self._bits == 8 else codes
        return own, scales.view(torch.bfloat16)

    def encoded(self, x: Tensor) -> Parts:
        """See `Format`."""
        return _encoded8(x.float()) if self._bits == 8 else _encoded4(rotated(x))

    def decoded(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Format`."""
        codes, scales = parts
        if self._bits == 8:
            whole: Tensor = codes.float() * scales
            return whole
        numbers = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        pairs = scales.float().unflatten(-1, (-1, 2)).repeat_interleave(GROUP, dim=-2)
        pairs = pairs[..., : self._head_dim, :]
        found: Tensor = numbers[..., : self._head_dim] * pairs[..., 0] + pairs[..., 1]
        return found

    def turned(self, x: Tensor) -> Tensor:
        """See `Format`."""
        return x.float() if self._bits == 8 else rotated(x)


def format_of(head_dim: int, dtype: torch.dtype, bits: int | None) -> Format:
    """How heads of the width `bits` are held in an engine of `dtype`."""
    return Plain(head_dim, dtype) if bits is None else Coded(head_dim, bits)


def rotated(x: Tensor) -> Tensor:
    """The orthonormal Hadamard rotation of `x` `[..., D]`, in float32; it undoes itself."""
    block, stride, x = rotation_block(x.shape[-1]), 1, x.float()
    while stride < block:
        low, high = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        stride *= 2
    return x * float(block**-0.5)


def _encoded8(x: Tensor) -> Parts:
    scale = _up(x.abs().amax(-1, keepdim=True) / 127)
    return _over(x, scale).round().to(torch.int8), scale.bfloat16()


def _encoded4(x: Tensor) -> Parts:
    head_dim = x.shape[-1]
    if short := groups(head_dim) * GROUP - head_dim if head_dim > GROUP else 0:
        # a shorter last group repeats its last number, which changes neither of its ends
        x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], short)), dim=-1)
    grouped = x.unflatten(-1, (groups(head_dim), -1))
    low = -_up(-grouped.amin(-1, keepdim=True))
    scale = _up((grouped.amax(-1, keepdim=True) - low) / 15)
    numbers = _over(grouped - low, scale).round().to(torch.uint8).flatten(-2)[..., :head_dim]
    codes = numbers[..., ::2].clone()
    codes[..., : head_dim // 2] |= numbers[..., 1::2] << 4
    return codes, torch.cat((scale, low), dim=-1).flatten(-2).bfloat16()


def _up(x: Tensor) -> Tensor:
    """The least bfloat16 number that is not below `x`, in float32."""
    raw = x.contiguous().view(torch.int32)
    more = (x > 0).to(torch.int32) * 0xFFFF
    up: Tensor = ((raw + more) & -0x10000).view(torch.float32)
    return up


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """`x / scale`, nought where the scale is."""
    return torch.where(scale > 0, x / scale, 0.0)
