"""Gemma 2: norms by 1 + weight before and after, caps on scores and logits, and a sliding window
on every second layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families.family import Family, Gguf, Names
from moac.checkpoint.families.gguf_windows import PERIOD, WINDOW, gguf_windows
from moac.checkpoint.families.reading import decoder, layer, layer_windows, positive, rope
from moac_runtime.package.spec import ModelSpec, NormSpec

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields

# What llama.cpp takes a file for that does not say.
_WINDOW, _WINDOW_PERIOD = 4096, 2
_SCORE_CAP, _LOGIT_CAP = 50.0, 30.0
# The 27B, alone of all sizes, scales queries by the width's share of a head.
_LAYERS_OF_27B = 46


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


def _gguf_config(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    layers = values["num_hidden_layers"]
    wide = layers == _LAYERS_OF_27B
    share = values["hidden_size"] // values["num_attention_heads"]
    return {
        **gguf_windows(fields, "gemma2", layers, period=_WINDOW_PERIOD, window=_WINDOW),
        "query_pre_attn_scalar": share if wide else values["head_dim"],
        "attn_logit_softcapping": fields.number("gemma2.attn_logit_softcapping", _SCORE_CAP),
        "final_logit_softcapping": fields.number("gemma2.final_logit_softcapping", _LOGIT_CAP),
    }


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
    gguf=Gguf(
        architecture="gemma2",
        norms_plus_one=True,
        fields=frozenset({WINDOW, PERIOD, "attn_logit_softcapping", "final_logit_softcapping"}),
        config=_gguf_config,
    ),
)
