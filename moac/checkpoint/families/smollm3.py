"""SmolLM3: Llama whose every fourth layer, as a rule, has no rotary embedding."""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family, Gguf
from moac.checkpoint.families.reading import decoder, layer, layer_windows, rope
from moac_runtime.errors import CheckpointError
from moac_runtime.package.spec import ModelSpec


def _spec(config: Any) -> ModelSpec:
    bias = bool(config.attention_bias)
    layers = [
        layer(
            config,
            window=own,
            rope=0 if rotates else None,
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bool(config.mlp_bias),
        )
        for own, rotates in zip(layer_windows(config), _rotating(config), strict=True)
    ]
    return decoder(config, layers, rope(config, "SmolLM3RotaryEmbedding"))


def _rotating(config: Any) -> list[bool]:
    """Which layers rotate; the list may be longer than there are layers, as in the library."""
    found, layers = config.no_rope_layers, config.num_hidden_layers
    if len(found) < layers:
        raise CheckpointError(
            f"config.json lists {len(found)} no_rope_layers for {layers} layers; restore it from "
            "the original checkpoint"
        )
    return [bool(rotates) for rotates in found[:layers]]


# pretraining_tp tells how it was trained: the library never divided the products of this family
FAMILY = Family(
    model_type="smollm3",
    spec=_spec,
    options=frozenset({"pretraining_tp"}),
    gguf=Gguf(architecture="smollm3", pairs=True),
)
