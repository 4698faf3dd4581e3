"""Gemma 3, text alone: norms by 1 + weight before and after, and a rotary table for each kind of
layer, local ones under a sliding window.
"""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family, Names
from moac.checkpoint.families.reading import (
    decoder,
    layer,
    layer_types,
    layer_windows,
    positive,
    ropes_by_type,
)
from moac_runtime.package.spec import ModelSpec, NormSpec


def _spec(config: Any) -> ModelSpec:
    norm, bias = NormSpec(float(config.rms_norm_eps), plus_one=True), bool(config.attention_bias)
    windows, types = layer_windows(config), layer_types(config)
    tables = list(dict.fromkeys(types))
    layers = [
        layer(
            config,
            activation="hidden_activation",
            norm=norm,
            query_scale=positive(config, "query_pre_attn_scalar") ** -0.5,
            window=own,
            rope=tables.index(kind),
            qk_norm="head",
            post_norm=True,
            qkv_bias=bias,
            o_bias=bias,
        )
        for own, kind in zip(windows, types, strict=True)
    ]
    capped = config.final_logit_softcapping is not None
    return decoder(
        config,
        layers,
        *ropes_by_type(config, "Gemma3RotaryEmbedding", tables),
        context=int(config.max_position_embeddings),  # the scaling is what reaches it
        norm=norm,
        embedding_scale=config.hidden_size**0.5,
        logit_cap=positive(config, "final_logit_softcapping") if capped else None,
    )


FAMILY = Family(
    model_type="gemma3_text",
    spec=_spec,
    names=Names(
        attn_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    activation="hidden_activation",
    options=frozenset({"final_logit_softcapping", "rope_parameters"}),
)
