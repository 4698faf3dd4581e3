"""The layers of a model rounded to 4 bits with feedback, one after another.

What a matrix is rounded by is what its layer gives it once all layers before are rounded. The text
is calibration's; nothing that evaluates reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moac.calibration import calibration_windows
from moac.checkpoint.families import family_of
from moac.packaging.feedback import damped, with_feedback
from moac.packaging.four_bits import Rounded
from moac.packaging.layers import Layer, opened
from moac.packaging.quantise import library_kind
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.weight_formats import format_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS, WINDOW_TOKENS = 8, 1024
"""The text that matrices are rounded by: how many windows, and how long each."""

Progress = Callable[[int, int], None]


def feedback_windows(spec: ModelSpec, tokenizer: Any, seed: int) -> list[tuple[int, ...]]:
    """The windows of calibration's text that a model of `spec` is rounded by."""
    return calibration_windows(tokenizer, min(WINDOW_TOKENS, spec.context), WINDOWS, seed)


@torch.no_grad()
def round_layers(
    model: PreTrainedModel, windows: Sequence[Sequence[int]], progress: Progress | None = None
) -> dict[str, Rounded]:
    """Round the layers' matrices of a float32 model in place; they are returned by their names.

    `windows`: token ids, equally many in each. Matrices that no linear module holds, as those of
    experts, stay as they are, and so do kinds that int4 weights have in 8 bits.
    """
    names = family_of(model.config.model_type).names
    layers, residuals = opened(model, model.get_submodule(names.layers), windows)
    rounded: dict[str, Rounded] = {}
    for index, layer in enumerate(layers):
        prefix = f"{names.layers}.{index}"
        for name, hessian in _hessians(layer, residuals).items():
            full = f"{prefix}.{name}.weight"
            if format_of(library_kind(full, names), "int4") == "int4":
                weight = layer.module.get_parameter(f"{name}.weight")
                rounded[full] = with_feedback(weight, hessian)
                weight.copy_(rounded[full].weight())
        residuals = [layer.run(x) for x in residuals]
        if progress is not None:
            progress(index + 1, len(layers))
    return rounded


def _hessians(layer: Layer, residuals: Sequence[Tensor]) -> dict[str, Tensor]:
    """The damped sum of `x x^T`, `[in, in]`, of what each linear module is given.

    Modules that are given the same have the same sum.
    """
    sums: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for residual in residuals:
        seen: dict[int, str] = {}
        for name, given in layer.inputs(residual).items():
            first[name] = seen.setdefault(id(given), name)
            if first[name] == name:
                x = given.flatten(0, -2)
                own = x.T @ x
                sums[name] = sums[name] + own if name in sums else own
    whole = {name: damped(hessian) for name, hessian in sums.items()}
    return {name: whole[own] for name, own in first.items()}
