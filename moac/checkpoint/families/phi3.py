"""Phi-3, Phi-3.5 and Phi-4, also mini: queries, keys and values lie in one matrix, as do gate and
up; a part of each head may rotate, by factors that follow from the length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families.family import Family, Gguf, Names
from moac.checkpoint.families.reading import decoder, layer, rope, window
from moac_runtime.package.spec import ModelSpec

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields

_CONTEXT, _FACTOR = "rope.scaling.original_context_length", "rope.scaling.attn_factor"


def _spec(config: Any) -> ModelSpec:
    one = layer(config, window=window(config))
    return decoder(config, [one] * config.num_hidden_layers, rope(config, "Phi3RotaryEmbedding"))


def _gguf_config(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    """A window of 0 stands for none, and factors for LongRoPE."""
    dim = values["head_dim"]
    rotated = fields.whole("phi3.rope.dimension_count", dim)
    rope = {**values["rope_parameters"], "partial_rotary_factor": rotated / dim}
    context = fields.whole(f"phi3.{_CONTEXT}", values["max_position_embeddings"])
    found = {
        f"{name}_factor": fields.numbers(f"rope_factors_{name}.weight", None)
        for name in ("short", "long")
    }
    if any(found.values()):
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": context, **found}
        if factor := fields.number(f"phi3.{_FACTOR}", 0):
            rope["attention_factor"] = float(factor)
    return {
        "sliding_window": fields.whole("phi3.attention.sliding_window", 0) or None,
        "original_max_position_embeddings": context,
        "rope_parameters": rope,
    }


FAMILY = Family(
    model_type="phi3",
    spec=_spec,
    names=Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    options=frozenset({"partial_rotary_factor"}),
    gguf=Gguf(
        architecture="phi3",
        fields=frozenset({"attention.sliding_window", "rope.dimension_count", _FACTOR}),
        config=_gguf_config,
        factors=True,
    ),
)
