"""Gemma 2: norms by 1 + weight before and after, caps on scores and logits, and a sliding window
on every second layer.
"""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family, Names
from moac.checkpoint.families.reading import decoder, layer, layer_windows, positive, rope
from moac_runtime.package.spec import ModelSpec, NormSpec


def _spec(config: Any) -> ModelSpec:
    norm, bias = NormSpec(float(config.rms_norm_eps), plus_one=True), bool(config.attention_bias)
    layers = [
        layer(
            config,
            activation="hidden_activation",
            norm=norm,
            query_scale=positive(config, "query_pre_attn_scalar") ** -0.5,
            window=own,
            logit_cap=cap(config, "attn_logit_softcapping"),
            post_norm=True,
            qkv_bias=bias,
            o_bias=bias,
        )
        for own in layer_windows(config)
    ]
    return decoder(
        config,
        layers,
        rope(config, "Gemma2RotaryEmbedding"),
        norm=norm,
        embedding_scale=config.hidden_size**0.5,
        logit_cap=cap(config, "final_logit_softcapping"),
    )


def cap(config: Any, name: str) -> float | None:
    """A cap of the config, None where it has none. Raises CheckpointError."""
    return None if getattr(config, name) is None else positive(config, name)


NAMES = Names(
    attn_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
FAMILY = Family(
    model_type="gemma2",
    spec=_spec,
    names=NAMES,
    activation="hidden_activation",
    rounded_scale=True,
    options=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
)
