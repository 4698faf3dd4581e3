"""What a family is: how its config reads, what its tensors are called, what it does not serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moac_runtime.package.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The library's names of a family's modules, those of a layer after `layers.N.`.

    Of `qkv` and `gate_up` there is one name for each part, or one for all of it. `attn_norm` and
    `mlp_norm` stand before their sublayer, the `post` ones after it.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of models; `families/llama.py` is the plainest.

    `model_type`: as config.json and transformers name it. `spec`: the spec of its parsed config.
    `activation`: the field of its config that names the activation. `options`: fields that change
    the function, are refused in general (`options.py`), and are read by `spec`. `gguf`: the name
    that llama.cpp gives the architecture, None where GGUF files of it are not read;
    `gguf_pairs`: whether these hold the numbers that rotate together beside each other.
    """

    model_type: str
    spec: Callable[[Any], ModelSpec]
    names: Names = field(default_factory=Names)
    activation: str = "hidden_act"
    options: frozenset[str] = frozenset()
    gguf: str | None = None
    gguf_pairs: bool = False
