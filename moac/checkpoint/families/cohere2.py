"""Cohere 2 (Command R7B, Aya): one layer norm before attention and MLP, which stand in parallel.
Layers under a sliding window rotate numbers beside each other; the others have no positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families.family import Family, Gguf
from moac.checkpoint.families.gguf_windows import PERIOD, WINDOW, gguf_windows
from moac.checkpoint.families.reading import decoder, layer, layer_windows, positive, rope
from moac_runtime.package.spec import ModelSpec, NormSpec

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields

_WINDOW_PERIOD = 4  # what llama.cpp takes a file for that does not say


def _spec(config: Any) -> ModelSpec:
    norm, bias = NormSpec(float(config.layer_norm_eps), centred=True), bool(config.attention_bias)
    layers = [
        layer(
            config,
            norm=norm,
            parallel=True,
            window=own,
            rope=None if own is None else 0,
            qkv_bias=bias,
            o_bias=bias,
        )
        for own in layer_windows(config)
    ]
    return decoder(
        config,
        layers,
        rope(config, "Cohere2RotaryEmbedding"),
        norm=norm,
        logit_scale=positive(config, "logit_scale"),
    )


def _gguf_config(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    layers = values["num_hidden_layers"]
    return {
        **gguf_windows(fields, "cohere2", layers, period=_WINDOW_PERIOD),
        "logit_scale": float(fields.number("cohere2.logit_scale")),
    }


FAMILY = Family(
    model_type="cohere2",
    spec=_spec,
    epsilon="layer_norm_eps",
    pairs=True,
    gguf=Gguf(
        architecture="cohere2",
        fields=frozenset({WINDOW, PERIOD, "logit_scale"}),
        config=_gguf_config,
    ),
)
