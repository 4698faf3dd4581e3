"""Weights in 8 bits: every matrix but the routers of experts, as whole numbers and one scale for
each of its rows.

A row is an output of a product, or a token of the embedding. Symmetric, rounded to nearest, so a
weight is wrong by half a scale at most: `|w - scale n| <= scale / 2`, `scale = max |w| / 127`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moac.checkpoint.families import family_of
from moac_runtime.package.weight_formats import has_format
from moac_runtime.package.weights import dequantised, is_matrix, scale_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST = 127
_LEAST_SCALE = 1e-30  # rows of zeros have one too
# Matrices without a format, as the library's modules call them: routers, and experts' biases.
_KEPT = (".mlp.gate.weight", ".mlp.router.weight", "_bias")


def quantised(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a package, each matrix that has a format as int8 numbers and, after it,
    float32 scales."""
    for name, tensor in tensors:
        if has_format(name, tensor.shape):
            numbers, scales = quantise(tensor)
            yield name, numbers
            yield scale_name(name), scales
        else:
            yield name, tensor


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers `[out, in]` int8 of -127 to 127 and scales `[out]` float32 of a weight."""
    wide = weight.float()
    scales = row_scales(wide)
    return (wide / scales[:, None]).round().to(torch.int8), scales


def row_scales(weight: Tensor) -> Tensor:
    """The scale `[out]` of each row of a float32 weight `[out, in]`."""
    return (weight.abs().amax(dim=1) / _MOST).clamp(min=_LEAST_SCALE)


@torch.no_grad()
def round_weights(model: PreTrainedModel) -> None:
    """Round the matrices of a float32 model as a package of int8 weights has them, in place."""
    for weight in _matrices(model):
        weight.copy_(dequantised(*quantise(weight), torch.float32))


@torch.no_grad()
def disturb_weights(model: PreTrainedModel, *, seed: int) -> None:
    """Add noise of the size of int8 rounding to a float32 model's matrices, in place.

    It shows what logits suffer from errors of this size, whatever made them: the numbers are
    uniform within half a scale, as rounding errors are, and know nothing of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in _matrices(model):
        noise = torch.rand(weight.shape, generator=generator) - 0.5
        weight.add_(noise * row_scales(weight)[:, None])


@torch.no_grad()
def disturb_roundings(model: PreTrainedModel, dtype: torch.dtype, *, seed: int) -> None:
    """Change a float32 model's matrices by as much as rounding to `dtype` does, in place.

    Mixtures of experts need it: a router's close choices fall otherwise by any rounding, so one
    run in `dtype` says little of the worst that another of the same precision does.
    """
    generator, most = torch.Generator().manual_seed(seed), torch.finfo(dtype).eps
    for weight in _matrices(model):
        noise = 2 * torch.rand(weight.shape, generator=generator) - 1
        weight.mul_(1 + most * noise)


def _matrices(model: PreTrainedModel) -> Iterator[Tensor]:
    """What a package has a format for, each once, a tied embedding and every expert too."""
    names = family_of(model.config.model_type).names
    for name, weight in model.named_parameters():
        if weight.dim() == 3:
            yield from weight.mT if names.transposed_experts else weight
        elif is_matrix(weight.shape) and not name.endswith(_KEPT):
            yield weight
