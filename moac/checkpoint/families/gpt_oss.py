"""gpt-oss: biased experts, learned logits in attention's softmax, every second layer windowed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moac.checkpoint.families.family import Family, Names
from moac.checkpoint.families.reading import (
    decoder,
    experts,
    layer,
    layer_windows,
    positive,
    rope,
)
from moac_runtime.package.spec import ModelSpec


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
)
