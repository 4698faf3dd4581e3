"""Matrices of experts in MXFP4: blocks of 32 numbers of 4 bits, each block under a power of two.

A number is a sign, two bits of exponent and one of fraction (`_VALUES`), the first of two in the
low half of a byte; a block's scale is an exponent's byte, 127 for 2^0. What they multiply out to
has two bits of fraction at most, so bfloat16 holds it exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moac_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix of every expert that lies in two tensors. `shape`: `[count, in, out]`, unpacked."""

    blocks: str
    scales: str
    shape: tuple[int, ...]


def packed_tensors(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Packed]:
    """What lies in pairs of `NAME_blocks` and `NAME_scales` among tensors of such shapes, by NAME.

    Raises CheckpointError where a pair is not whole or not of one matrix.
    """
    found = {}
    for blocks in (name for name in shapes if name.endswith(_BLOCKS)):
        name = blocks.removesuffix(_BLOCKS)
        scales, shape = f"{name}{_SCALES}", shapes[blocks]
        if len(shape) != 4 or shape[-1] != _BYTES or shapes.get(scales) != shape[:-1]:
            raise CheckpointError(
                f"{where} holds {blocks} with shape {list(shape)}, but no {scales} of a scale for "
                f"each of its blocks of {_BYTES} bytes; download the checkpoint again"
            )
        count, rows, groups, _ = shape
        found[name] = Packed(blocks, scales, (count, 2 * _BYTES * groups, rows))
    return found


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """The bfloat16 matrices `[count, in, out]` of uint8 `blocks` `[count, out, in / 32, 16]` and
    `scales` `[count, out, in / 32]`."""
    import torch

    values = torch.tensor(_VALUES, dtype=torch.bfloat16)
    numbers = torch.stack([values[(blocks & 15).int()], values[(blocks >> 4).int()]], dim=-1)
    exponents = scales.int()[..., None] - 127
    wide = torch.ldexp(numbers.flatten(-2).float(), exponents).to(torch.bfloat16)
    return wide.flatten(-2).mT.contiguous()
