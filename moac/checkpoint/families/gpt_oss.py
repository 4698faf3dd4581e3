"""gpt-oss: biased experts, learned logits in attention's softmax, every second layer windowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families.family import Family, Gguf, Names
from moac.checkpoint.families.gguf_windows import PERIOD, WINDOW, gguf_windows
from moac.checkpoint.families.options import refuse
from moac.checkpoint.families.reading import (
    decoder,
    experts,
    layer,
    layer_windows,
    positive,
    rope,
)
from moac_runtime.package.spec import ModelSpec

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields

_ARCH, _SCALING = "gpt-oss", "rope.scaling"


def _spec(config: Any) -> ModelSpec:
    bias = bool(config.attention_bias)
    one = layer(
        config,
        qkv_bias=bias,
        o_bias=bias,
        sink_logits=True,
        mlp_bias=True,
        experts=experts(config, normalised=True, router_bias=True),
        activation_slope=positive(config, "swiglu_alpha"),
        mlp_limit=positive(config, "swiglu_limit"),
        up_plus_one=True,
    )
    # the library has this activation whatever config.json says
    layers = [replace(one, window=own, activation="silu") for own in layer_windows(config)]
    return decoder(config, layers, rope(config, "GptOssRotaryEmbedding"))


def _gguf_config(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": fields.whole(f"{_ARCH}.expert_count"),
        "num_experts_per_tok": fields.whole(f"{_ARCH}.expert_used_count"),
        "intermediate_size": fields.whole(f"{_ARCH}.expert_feed_forward_length"),
        "rope_parameters": {**values["rope_parameters"], **_gguf_scaling(fields)},
        **gguf_windows(fields, _ARCH, values["num_hidden_layers"], period=2),
    }


def _gguf_scaling(fields: Fields) -> dict[str, Any]:
    """YaRN as the models are published with it, by a factor of the file's own."""
    kind = fields.text(f"{_ARCH}.{_SCALING}.type", "none")
    if kind == "none":
        return {}
    if kind != "yarn":
        raise refuse(f"{_ARCH}.{_SCALING}.type =", kind, "yarn, or none")
    return {
        "rope_type": "yarn",
        "factor": fields.number(f"{_ARCH}.{_SCALING}.factor"),
        "original_max_position_embeddings": fields.whole(
            f"{_ARCH}.{_SCALING}.original_context_length"
        ),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }


FAMILY = Family(
    model_type="gpt_oss",
    spec=_spec,
    names=Names(
        router="mlp.router",
        expert_gate_up=("mlp.experts.gate_up_proj",),
        expert_down="mlp.experts.down_proj",
    ),
    options=frozenset({"num_experts", "num_local_experts"}),
    mxfp4=True,
    gguf=Gguf(
        architecture=_ARCH,
        mlp_norm="post_attention_norm",
        fields=frozenset(
            {
                *("expert_count", "expert_used_count", "expert_feed_forward_length"),
                *(WINDOW, PERIOD, f"{_SCALING}.type", f"{_SCALING}.factor"),
            }
        ),
        config=_gguf_config,
    ),
)
