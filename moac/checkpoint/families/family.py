"""What a family is: how its config reads, what its tensors are called, what it does not serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moac_runtime.package.spec import ModelSpec

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The library's names of a family's modules, those of a layer after `layers.N.`.

    Of `qkv` and `gate_up` there is one name for each part, or one for all of it. `attn_norm` and
    `mlp_norm` stand before their sublayer, the `post` ones after it. `router`, `expert_gate_up`
    and `expert_down`: of layers that are mixtures of experts; "{}" is the expert's number. Where
    they lack it all experts lie in one tensor, transposed, gates and ups beside each other.
    """

    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    lm_head: str = "lm_head"
    layers: str = "model.layers"
    attn_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    attn_post_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_post_norm: str = ""
    sinks: str = "self_attn.sinks"
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
    expert_down: str = "mlp.experts.{}.down_proj"

    @property
    def transposed_experts(self) -> bool:
        """Whether all experts of a layer lie in one tensor `[count, in, out]`."""
        return "{}" not in self.expert_down


def _nothing_more(fields: Fields, values: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """How llama.cpp writes the files of a family.

    `architecture`: its name of the family, None where the files are not read. `pairs`: whether
    the numbers that rotate together lie beside each other. `norms_plus_one`: whether what it
    calls a norm's weight is one more than the library's. `config`: from the header and the config
    of its usual fields, the values that the family has besides or instead; `fields`: those it
    reads, after `ARCHITECTURE.`. `factors`: whether tensors hold LongRoPE's factors; these are
    among the fields then, by their names. `mixture`: whether of the files of that architecture
    those are meant that have experts, and another family has the others. `mlp_norm`: what it calls
    the norm before the MLP.
    """

    architecture: str | None = None
    mixture: bool = False
    mlp_norm: str = "ffn_norm"
    pairs: bool = False
    norms_plus_one: bool = False
    fields: frozenset[str] = frozenset()
    config: Callable[[Fields, Mapping[str, Any]], Mapping[str, Any]] = _nothing_more
    factors: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of models; `families/llama.py` is the plainest.

    `model_type`: as config.json and transformers name it. `spec`: the spec of its parsed config.
    `activation`: the field of its config that names the activation; `epsilon`: that of what norms
    add to a mean square. `options`: fields that change
    the function, are refused in general (`options.py`), and are read by `spec`. `gguf`: how GGUF
    files of it read. `rounded_scale`: whether the library rounds the embedding's factor to the
    weights' dtype. `pairs`: whether the numbers of a head that rotate together lie beside each
    other, and not half a head apart. `mxfp4`: whether experts are read where a checkpoint has them
    in MXFP4. `keeps_keywords`: whether the library's layers keep to themselves what attention is
    to be given besides (`profiling/hooks.py`).
    """

    model_type: str
    spec: Callable[[Any], ModelSpec]
    names: Names = field(default_factory=Names)
    activation: str = "hidden_act"
    epsilon: str = "rms_norm_eps"
    options: frozenset[str] = frozenset()
    gguf: Gguf = field(default_factory=Gguf)
    rounded_scale: bool = False
    pairs: bool = False
    mxfp4: bool = False
    keeps_keywords: bool = False
