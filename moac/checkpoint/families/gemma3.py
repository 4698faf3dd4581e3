"""Gemma 3, text alone: norms by 1 + weight before and after, and a rotary table for each kind of
layer, local ones under a sliding window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families.family import Family, Gguf
from moac.checkpoint.families.gemma2 import NAMES, cap
from moac.checkpoint.families.gguf_windows import PERIOD, WINDOW, gguf_windows
from moac.checkpoint.families.options import refuse
from moac.checkpoint.families.reading import (
    decoder,
    layer,
    layer_types,
    layer_windows,
    positive,
    ropes_by_type,
)
from moac_runtime.package.spec import ModelSpec, NormSpec

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields

# What llama.cpp takes a file for that does not say.
_WINDOW_PERIOD, _LOCAL_THETA = 6, 10000.0
# The 27B, alone of all sizes, scales queries by the width's share of a head.
_LAYERS_OF_27B = 62


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
    return decoder(
        config,
        layers,
        *ropes_by_type(config, "Gemma3RotaryEmbedding", tables),
        context=int(config.max_position_embeddings),  # the scaling is what reaches it
        norm=norm,
        embedding_scale=config.hidden_size**0.5,
        logit_cap=cap(config, "final_logit_softcapping"),
    )


def _gguf_config(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    layers, theta = values["num_hidden_layers"], values["rope_parameters"]["rope_theta"]
    wide = layers == _LAYERS_OF_27B
    return {
        **gguf_windows(fields, "gemma3", layers, period=_WINDOW_PERIOD),
        "rope_parameters": {
            "full_attention": {"rope_theta": theta, **_gguf_scaling(fields)},
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": fields.number("gemma3.rope.freq_base_swa", _LOCAL_THETA),
            },
        },
        "query_pre_attn_scalar": (
            values["hidden_size"] // values["num_attention_heads"] if wide else values["head_dim"]
        ),
        "final_logit_softcapping": fields.number("gemma3.final_logit_softcapping", 0) or None,
    }


def _gguf_scaling(fields: Fields) -> dict[str, Any]:
    """Of the layers without a window; a factor of 0 stands for none."""
    kind = fields.text("gemma3.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise refuse("gemma3.rope.scaling.type =", kind, "none, linear")
    factor = fields.number("gemma3.rope.scaling.factor", 0)
    if kind == "none" or factor in (0, 1):
        return {"rope_type": "default"}
    return {"rope_type": "linear", "factor": float(factor)}


FAMILY = Family(
    model_type="gemma3_text",
    spec=_spec,
    names=NAMES,
    activation="hidden_activation",
    rounded_scale=True,
    options=frozenset({"final_logit_softcapping", "rope_parameters"}),
    gguf=Gguf(
        architecture="gemma3",
        norms_plus_one=True,
        fields=frozenset(
            {
                WINDOW,
                PERIOD,
                "rope.freq_base_swa",
                "rope.scaling.type",
                "rope.scaling.factor",
                "final_logit_softcapping",
            }
        ),
        config=_gguf_config,
    ),
)
