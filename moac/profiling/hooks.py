"""The attention functions this package gives to transformers, through `AttentionInterface`.

A call's data (a recorder, a plan's spans) travels as a keyword of `model(...)`, which
transformers hands down to the attention function: no global state, safe under recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel

from moac.checkpoint.families import FAMILIES
from moac.profiling.attention import InfluenceRecorder, influence_attention
from moac_kernels.reference import layer_mask, masked_attention, rounded_heads
from moac_runtime.errors import MoacError
from moac_runtime.package.span import HeadSpan, visible

INFLUENCE = "moac_influence"  # measures what spans would cost, on the way back
REFERENCE = "moac_reference"  # runs a plan by the oracle, dense masks in float32: for checking

_QUERY_ROWS = 256
_REORDERED = 4e-6  # of the largest number: several times what float32 sums of another order do
# What transformers hands to attention of some models, and what changes the outcome.
_CHANGING = ("head_mask",)


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run `model` with one of this file's attention functions, then put its own back."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    hooks = list(handing_down(model))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


def handing_down(model: PreTrainedModel) -> Iterator[RemovableHandle]:
    """Where layers keep a call's data to themselves, hooks that give it to their attention.

    Nothing is hooked before the iterator is run through.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None or not family.keeps_keywords:
        return
    for layer in [part for part in model.modules() if hasattr(part, "self_attn")]:
        given: dict[str, Any] = {}
        yield layer.register_forward_pre_hook(partial(_note, given), with_kwargs=True)
        attention: torch.nn.Module = layer.self_attn  # type: ignore[assignment]
        yield attention.register_forward_pre_hook(partial(_add, given), with_kwargs=True)


def _note(
    given: dict[str, Any], layer: torch.nn.Module, args: Any, keywords: dict[str, Any]
) -> None:
    given.clear()
    given.update(keywords)


def _add(
    given: dict[str, Any], attention: torch.nn.Module, args: Any, keywords: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return args, {**given, **keywords}


def _influence(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    *,
    moac_recorder: InfluenceRecorder,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    _check_options(options)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    out = influence_attention(
        query,
        key,
        value,
        scale=scaling,
        cap=softcap,
        layer=layer,
        recorder=moac_recorder,
        sinks=s_aux,
    )
    return out.transpose(1, 2), None


def _reference(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    *,
    moac_spans: Sequence[Sequence[HeadSpan]],
    moac_key_orders: Sequence[Sequence[int]] | None = None,
    moac_disturbed: torch.Generator | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    _check_options(options)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    heads = moac_spans[layer]
    bits = [head.bits for head in heads]
    if moac_disturbed is not None:
        key, value = (_disturbed(x, moac_disturbed) for x in (key, value))
    key = rounded_heads(key, bits, None if moac_key_orders is None else moac_key_orders[layer])
    value = rounded_heads(value, bits)
    place = torch.arange(query.shape[2], device=query.device)
    parts = []
    for rows in place.split(_QUERY_ROWS):
        mask = layer_mask(lambda i, j, h: visible(i, j, heads[h]), rows, place, len(heads))
        seen = query[:, :, rows], key, value, mask
        parts.append(masked_attention(*seen, scaling, softcap, sinks=s_aux))
    return torch.cat(parts, dim=2).to(query.dtype).transpose(1, 2), None


def _disturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    """`x` as sums of another order might give it, so that some numbers round to the next code."""
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return x + noise * x.abs().amax(-1, keepdim=True) * _REORDERED


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise MoacError for an option of attention that these functions would drop."""
    found = next((name for name in _CHANGING if options.get(name) is not None), None)
    if found is not None:
        raise MoacError(
            f"the model's attention takes {found}, which is neither profiled nor checked; compile "
            "a model whose attention does without"
        )


AttentionInterface.register(INFLUENCE, _influence)
AttentionInterface.register(REFERENCE, _reference)
