"""Weights in 8 bits: every matrix but the routers of experts, as whole numbers and one scale for
each of its rows.

A row is an output of a product, or a token of the embedding. Symmetric, rounded to nearest, so a
weight is wrong by half a scale at most: `|w - scale n| <= scale / 2`, `scale = max |w| / 127`.
Of 4-bit weights (`four_bits`) embedding and head are these too. What either does to a model as
transformers has it is done here, and so is the rounding of activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moac.checkpoint.families import Names, family_of
from moac.packaging.four_bits import WORD, Rounded, group_scales, nearest
from moac.packaging.fuse import Source
from moac_runtime.package.weight_formats import BLOCK, format_of, has_format, kind_of
from moac_runtime.package.weights import dequantised, is_matrix, scale_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST = 127
_LEAST_SCALE = 1e-30  # rows of zeros have one too
# Matrices without a format, as the library's modules call them: routers, and experts' biases.
_KEPT = (".mlp.gate.weight", ".mlp.router.weight", "_bias")


def quantised(
    tensors: Iterable[tuple[str, Tensor]], weights: str = "int8"
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a package, each matrix that has a format as 8-bit or 4-bit numbers and then
    its scales.

    Words of a matrix that is rounded already (`Rounded.words`) are taken as they are.
    """
    for name, tensor in tensors:
        if has_format(name, tensor.shape):
            yield from zip((name, scale_name(name)), _stored(name, tensor, weights), strict=True)
        else:
            yield name, tensor


def _stored(name: str, tensor: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """Numbers and scales as they lie in a package."""
    if tensor.dtype == WORD:
        return Rounded.of_words(tensor).packed()
    if format_of(kind_of(name), weights) == "int4":
        return nearest(tensor).packed()
    return quantise(tensor)


def as_words(tensor: Source, rounded: Mapping[str, Rounded]) -> Source:
    """The source of a checkpoint's tensors, with words in place of what is `rounded` already."""

    def read(name: str) -> Tensor:
        return rounded[name].words() if name in rounded else tensor(name)

    return read


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers `[out, in]` int8 of -127 to 127 and scales `[out]` float32 of a weight."""
    wide = weight.float()
    scales = row_scales(wide)
    return (wide / scales[:, None]).round().to(torch.int8), scales


def row_scales(weight: Tensor) -> Tensor:
    """The scale `[out]` of each row of a float32 weight `[out, in]`."""
    return (weight.abs().amax(dim=1) / _MOST).clamp(min=_LEAST_SCALE)


@torch.no_grad()
def round_weights(
    model: PreTrainedModel, weights: str = "int8", rounded: Mapping[str, Rounded] | None = None
) -> None:
    """Round the matrices of a float32 model as a package of such weights has them, in place.

    `rounded`: those that are in 4 bits already, by the library's names; others go to nearest.
    """
    known = rounded or {}
    for name, weight, narrow in _matrices(model, weights):
        if name in known:
            weight.copy_(known[name].weight())
        elif narrow:
            weight.copy_(nearest(weight).weight())
        else:
            weight.copy_(dequantised(*quantise(weight), torch.float32))


@torch.no_grad()
def disturb_weights(model: PreTrainedModel, *, seed: int, weights: str = "int8") -> None:
    """Add noise of the size of rounding to a float32 model's matrices, in place.

    It shows what logits suffer from errors of this size, whatever made them: the numbers are
    uniform within half a scale, as rounding errors are, and know nothing of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, weight, narrow in _matrices(model, weights):
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


@torch.no_grad()
def disturb_roundings(model: PreTrainedModel, dtype: torch.dtype, *, seed: int) -> None:
    """Change a float32 model's matrices by as much as rounding to `dtype` does, in place.

    Mixtures of experts need it: a router's close choices fall otherwise by any rounding, so one
    run in `dtype` says little of the worst that another of the same precision does.
    """
    generator, most = torch.Generator().manual_seed(seed), torch.finfo(dtype).eps
    for _, weight, _ in _matrices(model, "full"):
        noise = 2 * torch.rand(weight.shape, generator=generator) - 1
        weight.mul_(1 + most * noise)


def library_kind(name: str, names: Names) -> str:
    """The kind of a matrix by the library's name of it; that of head and embedding is "embed"."""
    if ".experts." in name:
        return "down" if "down" in name else "gate_up"
    of_layers = {names.o: "o", names.down: "down"}
    of_layers |= dict.fromkeys(names.qkv, "qkv") | dict.fromkeys(names.gate_up, "gate_up")
    found = (kind for own, kind in of_layers.items() if name.endswith(f".{own}.weight"))
    return next(found, "embed")


def _matrices(model: PreTrainedModel, weights: str) -> Iterator[tuple[str, Tensor, bool]]:
    """What a package has a format for, each once, a tied embedding and every expert too, and
    whether it goes into 4 bits. Experts, many under one name, have none."""
    names = family_of(model.config.model_type).names
    for name, weight in model.named_parameters():
        narrow = format_of(library_kind(name, names), weights) == "int4"
        if weight.dim() == 3:
            every = weight.mT if names.transposed_experts else weight
            yield from (("", expert, narrow) for expert in every)
        elif is_matrix(weight.shape) and not name.endswith(_KEPT):
            yield name, weight, narrow
