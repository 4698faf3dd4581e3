"""Qwen2: Llama with biases on queries, keys and values alone; some layers may have a window."""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family, Gguf
from moac.checkpoint.families.reading import decoder, layer, layer_windows, rope
from moac_runtime.package.spec import ModelSpec


def _spec(config: Any) -> ModelSpec:
    # the biases are there whatever config.json says
    layers = [layer(config, window=own, qkv_bias=True) for own in layer_windows(config)]
    return decoder(config, layers, rope(config, "Qwen2RotaryEmbedding"))


FAMILY = Family(model_type="qwen2", spec=_spec, gguf=Gguf(architecture="qwen2"))
