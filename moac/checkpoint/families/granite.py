"""Granite 3: Llama with factors on the embedding, the residuals, the scores and the logits."""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family
from moac.checkpoint.families.reading import decoder, layer, positive, rope
from moac_runtime.package.spec import ModelSpec


def _spec(config: Any) -> ModelSpec:
    bias = bool(config.attention_bias)
    one = layer(
        config,
        query_scale=positive(config, "attention_multiplier"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(config.mlp_bias),
    )
    return decoder(
        config,
        [one] * config.num_hidden_layers,
        rope(config, "GraniteRotaryEmbedding"),
        embedding_scale=positive(config, "embedding_multiplier"),
        residual_scale=positive(config, "residual_multiplier"),
        logit_scale=1 / positive(config, "logits_scaling"),
    )


FAMILY = Family(model_type="granite", spec=_spec)
