"""OLMo 2: norms after every sublayer and none before, and queries and keys normed across heads."""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family, Gguf, Names
from moac.checkpoint.families.reading import decoder, layer, rope
from moac_runtime.package.spec import ModelSpec


def _spec(config: Any) -> ModelSpec:
    bias = bool(config.attention_bias)
    one = layer(
        config, pre_norm=False, post_norm=True, qk_norm="width", qkv_bias=bias, o_bias=bias
    )
    return decoder(config, [one] * config.num_hidden_layers, rope(config, "Olmo2RotaryEmbedding"))


FAMILY = Family(
    model_type="olmo2",
    spec=_spec,
    names=Names(
        attn_norm="",
        attn_post_norm="post_attention_layernorm",
        mlp_norm="",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    gguf=Gguf(architecture="olmo2"),
)
