"""StableLM: layer norms with biases, and a part of each head that rotates; attention and MLP may
stand in parallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families.family import Family, Gguf
from moac.checkpoint.families.options import refuse
from moac.checkpoint.families.reading import decoder, head_dim, layer, rope
from moac_runtime.package.spec import ModelSpec, NormSpec

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields

_PARALLEL, _ROTATED = "use_parallel_residual", "rope.dimension_count"


def _spec(config: Any) -> ModelSpec:
    if config.qk_layernorm:
        raise refuse("qk_layernorm", True, "heads that have no norms of their own")
    share = config.hidden_size // config.num_attention_heads
    if head_dim(config) != share:
        raise refuse("head_dim", head_dim(config), f"the width's share of a head, {share}")
    norm = NormSpec(float(config.layer_norm_eps), centred=True, bias=True)
    one = layer(
        config,
        norm=norm,
        parallel=bool(config.use_parallel_residual),
        qkv_bias=bool(config.use_qkv_bias),
    )
    table = rope(config, "StableLmRotaryEmbedding")
    return decoder(config, [one] * config.num_hidden_layers, table, norm=norm)


def _gguf_config(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    dim = values["head_dim"]
    share = fields.whole(f"stablelm.{_ROTATED}", dim) / dim
    return {
        "rope_parameters": {**values["rope_parameters"], "partial_rotary_factor": share},
        "use_parallel_residual": fields.flag(f"stablelm.{_PARALLEL}", False),
    }


FAMILY = Family(
    model_type="stablelm",
    spec=_spec,
    epsilon="layer_norm_eps",
    options=frozenset({"partial_rotary_factor"}),
    keeps_keywords=True,
    gguf=Gguf(
        architecture="stablelm",
        fields=frozenset({_PARALLEL, _ROTATED}),
        config=_gguf_config,
    ),
)
