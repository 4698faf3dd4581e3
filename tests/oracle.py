"""The whole-model oracle: transformers' own model, its attention replaced by the dense reference.

Each layer's mask comes from a plan's spans; nothing of the runtime's fast paths is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from batches import Batch
from families import checkpoint_tensors
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from moac.checkpoint.families import model_spec
from moac.checkpoint.key_order import key_orders
from moac.packaging.fuse import head_order, pack_weights
from moac.profiling.hooks import attention
from moac_kernels.reference import layer_mask, masked_attention, rounded_heads
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import HeadSpan, visible

ORACLE = "moac_oracle"


def _reference(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    *,
    oracle_masks: Sequence[Tensor],
    oracle_bits: Sequence[Sequence[int | None]] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    mask, layer = oracle_masks[module.layer_idx], int(module.layer_idx)
    if oracle_bits is not None:
        order = key_orders(model_spec(module.config))[layer]
        key = rounded_heads(key, oracle_bits[layer], order)
        value = rounded_heads(value, oracle_bits[layer])
    out = masked_attention(query, key, value, mask, scaling, softcap, sinks=s_aux)
    return out.to(query.dtype).transpose(1, 2), None


AttentionInterface.register(ORACLE, _reference)


def span_masks(heads: Sequence[HeadSpan], length: int) -> Tensor:
    """What the queries of one layer see, `[K, length, length]`."""
    place = torch.arange(length)
    return layer_mask(lambda q, k, h: visible(q, k, heads[h]), place, place, len(heads))


def grown_masks(plan: Plan, layer: int, phases: Sequence[tuple[int, int]]) -> Tensor:
    """What the queries of one layer see where a session grew, `[K, T, T]`.

    `phases`: a capacity, and the tokens fed when it was left for the next. A key out of the last
    query's sight when a phase ends is lost to all later queries.
    """
    length = phases[-1][1]
    mask = torch.zeros(len(plan.rules[layer]), length, length, dtype=torch.bool)
    lost = torch.zeros(len(plan.rules[layer]), 1, length, dtype=torch.bool)
    first = 0
    for capacity, stop in phases:
        seen = span_masks(plan.spans(capacity)[layer], length)
        mask[:, first:stop] = seen[:, first:stop] & ~lost
        lost[:, :, :stop] |= ~seen[:, stop - 1 : stop, :stop]
        first = stop
    return mask


@torch.no_grad()
def masked_logits(
    model: PreTrainedModel,
    tokens: Sequence[int],
    masks: Sequence[Tensor],
    bits: Sequence[Sequence[int | None]] | None = None,
) -> Tensor:
    """Float32 logits `[T, V]` of `tokens` under one mask `[K, T, T]` a layer.

    `bits[layer][kv_head]`: the widths of keys and values, None for unrounded ones.
    """
    with attention(model, ORACLE):  # what gives the masks to attention of every family
        given: dict[str, Any] = {"oracle_masks": masks, "oracle_bits": bits}
        out = model(torch.tensor([list(tokens)]), use_cache=False, **given)
    logits: Tensor = out.logits[0]
    return logits.float()


def oracle_logits(
    model: PreTrainedModel, tokens: Sequence[int], plan: Plan, capacity: int
) -> Tensor:
    """Float32 logits `[T, V]` of `tokens` under spans and widths of `plan` at `capacity`."""
    masks = [span_masks(heads, len(tokens)) for heads in plan.spans(capacity)]
    return masked_logits(model, tokens, masks, widths(plan))


def widths(plan: Plan) -> list[list[int | None]]:
    """The width of every KV head of a plan, `[layers][kv_heads]`."""
    return [[rule.bits for rule in layer] for layer in plan.rules]


def packed(
    model: PreTrainedModel, plan: Plan, *, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, tuple[tuple[int, ...], ...]]:
    """The runtime's decoder of `model`, heads packed for `plan`, and the head order."""
    spec, order, weights = model_spec(model.config), head_order(plan), checkpoint_tensors(model)
    tensors = dict(pack_weights(weights.__getitem__, spec, order))
    return Decoder(spec, tensors, dtype=dtype), order


def open_session(
    model: PreTrainedModel,
    plan: Plan,
    *,
    capacity: int,
    batch: int = 1,
    chunk: int = 512,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Rows of a session on `model` under `plan`."""
    decoder, order = packed(model, plan, dtype=dtype)
    session = TorchSession(decoder, plan, order, chunk=chunk)
    return Batch(session, batch=batch, capacity=capacity)
