"""Qwen3-MoE: Qwen3 whose MLPs, all or some, are mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moac.checkpoint.families.family import Family
from moac.checkpoint.families.reading import decoder, experts, layer, rope, whole, window
from moac_runtime.package.spec import ModelSpec


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


FAMILY = Family(
    model_type="qwen3_moe",
    spec=_spec,
    options=frozenset({"num_experts", "num_local_experts"}),
)
