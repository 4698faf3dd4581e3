"""Phi-3, Phi-3.5 and Phi-4, also mini: queries, keys and values lie in one matrix, as do gate and
up; a part of each head may rotate, by factors that follow from the length.
"""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family, Names
from moac.checkpoint.families.reading import decoder, layer, rope, window
from moac_runtime.package.spec import ModelSpec


def _spec(config: Any) -> ModelSpec:
    one = layer(config, window=window(config))
    return decoder(config, [one] * config.num_hidden_layers, rope(config, "Phi3RotaryEmbedding"))


FAMILY = Family(
    model_type="phi3",
    spec=_spec,
    names=Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    options=frozenset({"partial_rotary_factor"}),
)
