"""Mixtral: Mistral whose MLPs are mixtures of experts."""

from __future__ import annotations

from typing import Any

from moac.checkpoint.families.family import Family, Names
from moac.checkpoint.families.reading import decoder, experts, layer, rope, window
from moac_runtime.package.spec import ModelSpec


def _spec(config: Any) -> ModelSpec:
    own = experts(config, normalised=True)
    one = layer(config, window=window(config), experts=own)
    table = rope(config, "MixtralRotaryEmbedding")
    return decoder(config, [one] * config.num_hidden_layers, table)


FAMILY = Family(
    model_type="mixtral",
    spec=_spec,
    names=Names(
        router="block_sparse_moe.gate",
        expert_gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        expert_down="block_sparse_moe.experts.{}.w2",
    ),
    options=frozenset({"num_experts", "num_local_experts"}),
)
