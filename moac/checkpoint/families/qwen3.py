"""Qwen3: Llama with norms on every query and key head; some layers may have a window."""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family, Gguf
from moac.checkpoint.families.reading import decoder, layer, layer_windows, rope
from moac_runtime.package.spec import ModelSpec


def _spec(config: Any) -> ModelSpec:
    bias = bool(config.attention_bias)
    layers = [
        layer(config, window=own, qk_norm="head", qkv_bias=bias, o_bias=bias)
        for own in layer_windows(config)
    ]
    return decoder(config, layers, rope(config, "Qwen3RotaryEmbedding"))


FAMILY = Family(model_type="qwen3", spec=_spec, gguf=Gguf(architecture="qwen3"))
