"""Mixtral: Mistral whose MLPs are mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families.family import Family, Gguf, Names
from moac.checkpoint.families.reading import decoder, experts, layer, rope, window
from moac_runtime.package.spec import ModelSpec

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields


def _spec(config: Any) -> ModelSpec:
    own = experts(config, normalised=True)
    one = layer(config, window=window(config), experts=own)
    table = rope(config, "MixtralRotaryEmbedding")
    return decoder(config, [one] * config.num_hidden_layers, table)


def _gguf_config(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": fields.whole("llama.expert_count"),
        "num_experts_per_tok": fields.whole("llama.expert_used_count"),
        "sliding_window": None,
    }


FAMILY = Family(
    model_type="mixtral",
    spec=_spec,
    names=Names(
        router="block_sparse_moe.gate",
        expert_gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        expert_down="block_sparse_moe.experts.{}.w2",
    ),
    options=frozenset({"num_experts", "num_local_experts"}),
    gguf=Gguf(
        architecture="llama",
        mixture=True,
        pairs=True,
        fields=frozenset({"expert_count", "expert_used_count"}),
        config=_gguf_config,
    ),
)
