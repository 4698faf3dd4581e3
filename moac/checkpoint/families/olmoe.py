"""OLMoE: mixtures of experts, with norms of queries and keys across all heads."""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family
from moac.checkpoint.families.options import refuse
from moac.checkpoint.families.reading import decoder, experts, head_dim, layer, rope
from moac_runtime.package.spec import ModelSpec


def _spec(config: Any) -> ModelSpec:
    if config.clip_qkv is not None:
        raise refuse("clip_qkv", config.clip_qkv, "queries, keys and values as they are (null)")
    if config.hidden_size != head_dim(config) * config.num_attention_heads:
        raise refuse("head_dim", head_dim(config), "hidden_size / num_attention_heads")
    bias = bool(config.attention_bias)
    one = layer(
        config,
        qk_norm="width",
        qkv_bias=bias,
        o_bias=bias,
        experts=experts(config, normalised=bool(config.norm_topk_prob)),
    )
    return decoder(config, [one] * config.num_hidden_layers, rope(config, "OlmoeRotaryEmbedding"))


FAMILY = Family(
    model_type="olmoe",
    spec=_spec,
    options=frozenset({"num_experts", "num_local_experts"}),
)
