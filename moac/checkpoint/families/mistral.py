"""Mistral: Llama without biases, all layers under one sliding window or none."""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family
from moac.checkpoint.families.reading import decoder, layer, rope, window
from moac_runtime.package.spec import ModelSpec


def _spec(config: Any) -> ModelSpec:
    one = layer(config, window=window(config))
    table = rope(config, "MistralRotaryEmbedding")
    return decoder(config, [one] * config.num_hidden_layers, table)


FAMILY = Family(model_type="mistral", spec=_spec)
