"""Weights in 8 bits: every matrix as whole numbers and one scale for each of its rows.

A row is an output of a product, or a token of the embedding. Symmetric, rounded to nearest, so a
weight is wrong by half a scale at most: `|w - scale n| <= scale / 2`, `scale = max |w| / 127`.
Of 4-bit weights (`four_bits`) embedding and head are these too. What either does to a model as
transformers has it is done here, and so is the rounding of activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moac.packaging.four_bits import group_scales, quantise4
from moac_runtime.package.weight_formats import BLOCK, format_of, kind_of
from moac_runtime.package.weights import dequantised, is_matrix, scale_name, unpacked

_MOST = 127
_LEAST_SCALE = 1e-30  # rows of zeros have one too


def quantised(
    tensors: Iterable[tuple[str, Tensor]], weights: str = "int8"
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a package, each matrix as 8-bit or 4-bit numbers and then its scales."""
    for name, tensor in tensors:
        if is_matrix(tensor.shape):
            narrow = format_of(kind_of(name), weights) == "int4"
            numbers, scales = quantise4(tensor) if narrow else quantise(tensor)
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
def round_weights(model: nn.Module, weights: str = "int8") -> None:
    """Round the matrices of a float32 model as a package of such weights has them, in place."""
    for weight, narrow in _matrices(model, weights):
        if narrow:
            weight.copy_(unpacked(*quantise4(weight), weight.shape[1], torch.float32))
        else:
            weight.copy_(dequantised(*quantise(weight), torch.float32))


@torch.no_grad()
def disturb_weights(model: nn.Module, *, seed: int, weights: str = "int8") -> None:
    """Add noise of the size of rounding to a float32 model's matrices, in place.

    It shows what logits suffer from errors of this size, whatever made them: the numbers are
    uniform within half a scale, as rounding errors are, and know nothing of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight, narrow in _matrices(model, weights):
        noise = torch.rand(weight.shape, generator=generator) - 0.5
        weight.add_(noise * (group_scales(weight) if narrow else row_scales(weight)[:, None]))


@contextmanager
def disturbed_activations(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Every linear layer of a model gets noise of the size of 8-bit rounding on what it is given.

    Each token has a scale for a block of 64 numbers, and the noise is uniform within half of it.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = given
        fill = -x.shape[-1] % BLOCK
        blocks = F.pad(x, (0, fill)).unflatten(-1, (-1, BLOCK))
        scales = blocks.abs().amax(-1, keepdim=True) / _MOST
        noise = (torch.rand(blocks.shape, generator=generator) - 0.5).to(x) * scales
        return (x + noise.flatten(-2)[..., : x.shape[-1]], *rest)

    hooks = [
        module.register_forward_pre_hook(disturb)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _matrices(model: nn.Module, weights: str) -> list[tuple[nn.Parameter, bool]]:
    """Each once, a tied embedding too, and whether it goes into 4 bits."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    wide = [id(table.weight) for table in tables if table is not None]
    return [
        (parameter, weights == "int4" and id(parameter) not in wide)
        for parameter in model.parameters()
        if is_matrix(parameter.shape)
    ]
