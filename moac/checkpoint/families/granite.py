"""Granite 3: Llama with factors on the embedding, the residuals, the scores and the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families.family import Family, Gguf
from moac.checkpoint.families.reading import decoder, layer, positive, rope
from moac_runtime.package.spec import ModelSpec

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields


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


def _gguf_config(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    """The factors; one of 0 stands for none."""

    def factor(name: str, neutral: float) -> float:
        found: float = fields.number(f"granite.{name}", 0) or neutral
        return float(found)

    return {
        "embedding_multiplier": factor("embedding_scale", 1),
        "residual_multiplier": factor("residual_scale", 1),
        "attention_multiplier": factor("attention.scale", values["head_dim"] ** -0.5),
        "logits_scaling": factor("logit_scale", 1),
    }


FAMILY = Family(
    model_type="granite",
    spec=_spec,
    gguf=Gguf(
        architecture="granite",
        pairs=True,
        fields=frozenset({"embedding_scale", "residual_scale", "attention.scale", "logit_scale"}),
        config=_gguf_config,
    ),
)
