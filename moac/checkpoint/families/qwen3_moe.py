"""Qwen3-MoE: Qwen3 whose MLPs, all or some, are mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families.family import Family, Gguf
from moac.checkpoint.families.reading import decoder, experts, layer, rope, whole, window
from moac_runtime.package.spec import ModelSpec

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields


def _spec(config: Any) -> ModelSpec:
    bias = bool(config.attention_bias)
    dense = layer(config, window=window(config), qk_norm="head", qkv_bias=bias, o_bias=bias)
    sparse = replace(
        dense,
        intermediate_size=whole(config, "moe_intermediate_size"),
        experts=experts(config, normalised=bool(config.norm_topk_prob)),
    )
    layers = [sparse if mixed else dense for mixed in _mixed(config)]
    return decoder(config, layers, rope(config, "Qwen3MoeRotaryEmbedding"))


def _mixed(config: Any) -> list[bool]:
    """Which layers are mixtures: every `decoder_sparse_step`-th, but for those listed as plain."""
    step = whole(config, "decoder_sparse_step")
    return [
        index not in config.mlp_only_layers and (index + 1) % step == 0
        for index in range(config.num_hidden_layers)
    ]


def _gguf_config(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": fields.whole("qwen3moe.expert_count"),
        "num_experts_per_tok": fields.whole("qwen3moe.expert_used_count"),
        "moe_intermediate_size": fields.whole("qwen3moe.expert_feed_forward_length"),
        "norm_topk_prob": True,  # as llama.cpp takes every file of it
    }


FAMILY = Family(
    model_type="qwen3_moe",
    spec=_spec,
    options=frozenset({"num_experts", "num_local_experts"}),
    gguf=Gguf(
        architecture="qwen3moe",
        fields=frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"}),
        config=_gguf_config,
    ),
)
