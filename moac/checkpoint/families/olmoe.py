"""OLMoE: mixtures of experts, with norms of queries and keys across all heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families.family import Family, Gguf
from moac.checkpoint.families.options import refuse
from moac.checkpoint.families.reading import decoder, experts, head_dim, layer, rope
from moac_runtime.package.spec import ModelSpec

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields


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


def _gguf_config(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": fields.whole("olmoe.expert_count"),
        "num_experts_per_tok": fields.whole("olmoe.expert_used_count"),
        "norm_topk_prob": False,
    }


FAMILY = Family(
    model_type="olmoe",
    spec=_spec,
    options=frozenset({"num_experts", "num_local_experts"}),
    gguf=Gguf(
        architecture="olmoe",
        fields=frozenset({"expert_count", "expert_used_count"}),
        config=_gguf_config,
    ),
)
