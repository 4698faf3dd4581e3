"""The whole-model oracle: transformers' own model, its attention replaced by the dense reference.

Each layer's mask comes from a plan's spans; nothing of the runtime's fast paths is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from moac_kernels.reference import layer_mask, masked_attention
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from moac.checkpoint.model_spec import model_spec
from moac.packaging.fuse import head_order, pack_weights
from moac_runtime.decoder import Decoder
from moac_runtime.plan import Plan
from moac_runtime.session import Session
from moac_runtime.span import HeadSpan, visible

ORACLE = "moac_oracle"


def _reference(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    *,
    oracle_spans: Sequence[Sequence[HeadSpan]],
    **_: Any,
) -> tuple[Tensor, None]:
    heads, place = oracle_spans[module.layer_idx], torch.arange(query.shape[2])
    mask = layer_mask(lambda q, k, h: visible(q, k, heads[h]), place, place, len(heads))
    return masked_attention(query, key, value, mask, scaling).transpose(1, 2), None


AttentionInterface.register(ORACLE, _reference)


@torch.no_grad()
def oracle_logits(
    model: PreTrainedModel, tokens: Sequence[int], plan: Plan, capacity: int
) -> Tensor:
    """Float32 logits `[T, V]` of `tokens` under the spans of `plan` at `capacity`."""
    model.set_attn_implementation(ORACLE)
    ids = torch.tensor([list(tokens)])
    out = model(ids, use_cache=False, oracle_spans=plan.spans(capacity))
    logits: Tensor = out.logits[0]
    return logits.float()


def packed(
    model: PreTrainedModel, plan: Plan, *, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, tuple[tuple[int, ...], ...]]:
    """The runtime's decoder of `model`, heads packed for `plan`, and the head order."""
    spec, order, weights = model_spec(model.config), head_order(plan), model.state_dict()
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
) -> Session:
    """A session on `model` under `plan`."""
    decoder, order = packed(model, plan, dtype=dtype)
    return Session(decoder, plan, order, batch=batch, capacity=capacity, chunk=chunk)
