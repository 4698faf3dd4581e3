"""Llama: rotary grouped-query attention and a gated MLP, with RMS norms before both."""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family, Gguf
from moac.checkpoint.families.reading import decoder, layer, rope
from moac_runtime.package.spec import ModelSpec


def _spec(config: Any) -> ModelSpec:
    bias = bool(config.attention_bias)
    one = layer(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.mlp_bias))
    return decoder(config, [one] * config.num_hidden_layers, rope(config, "LlamaRotaryEmbedding"))


FAMILY = Family(model_type="llama", spec=_spec, gguf=Gguf(architecture="llama", pairs=True))
