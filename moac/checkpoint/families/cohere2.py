"""Cohere 2 (Command R7B, Aya): one layer norm before attention and MLP, which stand in parallel.
Layers under a sliding window rotate numbers beside each other; the others have no positions.
"""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family
from moac.checkpoint.families.reading import decoder, layer, layer_windows, positive, rope
from moac_runtime.package.spec import ModelSpec, NormSpec


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


FAMILY = Family(model_type="cohere2", spec=_spec, epsilon="layer_norm_eps", pairs=True)
