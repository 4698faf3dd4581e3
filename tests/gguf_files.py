"""GGUF files of tiny models and tokenizers, written as llama.cpp's converters write them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from families import CHAT_TEMPLATE, checkpoint_tensors, tiny_model, tiny_tokenizer

from moac.checkpoint.families import Family, family_of
from moac.checkpoint.gguf import library_names

_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.\d+\."
    r"(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight"
)
_PARTS = {
    **{f"{part}_proj": part for part in ("gate", "up", "down")},
    **{"w1": "gate", "w3": "up", "w2": "down"},
}
_ALL_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?")


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order (pairs beside each other)."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, -1).transpose(1, 2).reshape(weight.shape)


def byte_level_fields(pre: str) -> dict[str, Any]:
    """Fields after `tokenizer.` of the tiny tokenizer."""
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = sorted(backend["model"]["vocab"].items(), key=lambda item: item[1])
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": [token for token, _ in vocabulary],
        "ggml.token_type": [3 if index < 3 else 1 for _, index in vocabulary],
        "ggml.merges": [" ".join(pair) for pair in backend["model"]["merges"]],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.eot_token_id": 0,
        "chat_template": CHAT_TEMPLATE,
    }


def tiny_original(family: str, **overrides: Any) -> Any:
    """A tiny model that a file can tell of: some options follow from the size or the layer."""
    if family == "cohere2":  # three of four layers under the window
        types = ["sliding_attention"] * 3 + ["full_attention"]
        overrides = {"num_hidden_layers": 4, "layer_types": types, **overrides}
    if family == "smollm3":
        overrides = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], **overrides}
    if family == "qwen3_moe":  # every layer is a mixture
        overrides = {"mlp_only_layers": [], **overrides}
    if family == "gpt_oss":  # as llama.cpp takes every file of it
        overrides = {"swiglu_limit": 7.0, **overrides}
    if family in ("gemma2", "gemma3_text"):
        overrides = {"query_pre_attn_scalar": overrides.get("head_dim", 16), **overrides}
    return tiny_model(family, **overrides)


def write_gguf(
    path: Path,
    *,
    family: str = "llama",
    pre: str = "smollm",
    tokenizer: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    big_endian: bool = False,
    stored_as: Any = None,
    **extra: Any,
) -> dict[str, torch.Tensor]:
    """A float32 GGUF of a tiny model of `family`, a `model_type`; returns the model's tensors.

    `tokenizer`: its fields after `tokenizer.`; `fields`: others by whole name, None to leave one
    out; `overrides`: of the model's config; `stored_as`: a type of the format for the matrices,
    in place of float32; `extra`: calls of the writer with their argument.
    """
    from gguf import GGUFEndian, GGUFWriter

    tokenizer = byte_level_fields(pre) if tokenizer is None else tokenizer
    sizes = {"vocab_size": len(tokenizer["ggml.tokens"])}
    model = tiny_original(family, **{**sizes, **(overrides or {})})
    config, state, kind = model.config, checkpoint_tensors(model), family_of(family)
    arch = str(kind.gguf.architecture)
    endian = GGUFEndian.BIG if big_endian else GGUFEndian.LITTLE
    writer = GGUFWriter(path, arch, endianess=endian)
    for name, value in extra.items():
        getattr(writer, name)(value)
    values = {
        **{f"{arch}.{name}": value for name, value in _shape(config).items()},
        **{f"tokenizer.{name}": value for name, value in tokenizer.items()},
        **(fields or {}),
    }
    for name, value in values.items():
        _add(writer, name, value)
    tied = config.tie_word_embeddings
    for name, tensor in with_stacks(state).items():
        if not (tied and name == "lm_head.weight"):
            stored = _stored(name, tensor, config, kind)
            _add_tensor(writer, gguf_name(name, kind), stored, stored_as)
    for name in ("short", "long"):
        if factors := config.rope_parameters.get(f"{name}_factor"):
            writer.add_tensor(f"rope_factors_{name}.weight", torch.tensor(factors).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: tensor for name, tensor in state.items() if not tied or name != "lm_head.weight"}


def with_stacks(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, those of a layer's experts as one: `blk.N.ffn_gate_exps.weight` and so on."""
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        if told := _EXPERT.match(name):
            layer, part = told.groups()
            found.setdefault(f"blk.{layer}.ffn_{_PARTS[part]}_exps.weight", []).append(tensor)
        elif told := _ALL_EXPERTS.match(name):
            found |= _unstacked(*told.groups(), tensor)
        else:
            found[name] = tensor
    return {
        name: torch.stack(tensor) if isinstance(tensor, list) else tensor
        for name, tensor in found.items()
    }


def _unstacked(
    layer: str, parts: str, bias: str | None, tensor: torch.Tensor
) -> dict[str, torch.Tensor]:
    """gpt-oss's experts: rows and columns exchanged, gates and ups each in a tensor of its own."""
    rows = tensor if bias else tensor.mT
    kind = "bias" if bias else "weight"
    if parts == "down":
        return {f"blk.{layer}.ffn_down_exps.{kind}": rows.contiguous()}
    each = {"gate": rows[:, ::2], "up": rows[:, 1::2]}
    return {f"blk.{layer}.ffn_{part}_exps.{kind}": x.contiguous() for part, x in each.items()}


def _shape(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        **_epsilon(config),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }
    if hasattr(config, "num_experts"):
        found |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        }
    rope = config.rope_parameters
    if "rope_theta" in rope:
        found["rope.freq_base"] = float(rope["rope_theta"])
    own = {
        "cohere2": _cohere2,
        "gemma2": _gemma2,
        "gemma3_text": _gemma3,
        "gpt_oss": _gpt_oss,
        "granite": _granite,
        "phi3": _phi3,
        "stablelm": _stablelm,
    }.get(config.model_type)
    return found if own is None else {**found, **own(config)}


def _epsilon(config: Any) -> dict[str, Any]:
    if hasattr(config, "layer_norm_eps"):
        return {"attention.layer_norm_epsilon": float(config.layer_norm_eps)}
    return {"attention.layer_norm_rms_epsilon": float(config.rms_norm_eps)}


def _cohere2(config: Any) -> dict[str, Any]:
    return {
        "attention.sliding_window": config.sliding_window,
        "logit_scale": float(config.logit_scale),
        "rope.scaling.type": "none",
    }


def _gemma2(config: Any) -> dict[str, Any]:
    return {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _gpt_oss(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    scaled = rope["rope_type"] == "yarn"
    return {
        "expert_feed_forward_length": config.intermediate_size,
        "attention.sliding_window": config.sliding_window,
        "rope.scaling.type": "yarn" if scaled else None,
        "rope.scaling.factor": float(rope["factor"]) if scaled else None,
        "rope.scaling.original_context_length": (
            rope["original_max_position_embeddings"] if scaled else None
        ),
    }


def _stablelm(config: Any) -> dict[str, Any]:
    share = config.hidden_size // config.num_attention_heads
    return {
        "rope.dimension_count": int(config.rope_parameters["partial_rotary_factor"] * share),
        "use_parallel_residual": config.use_parallel_residual,
    }


def _granite(config: Any) -> dict[str, Any]:
    return {
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "attention.scale": float(config.attention_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _phi3(config: Any) -> dict[str, Any]:
    rope, share = config.rope_parameters, config.hidden_size // config.num_attention_heads
    told = {
        "attention.key_length": None,
        "attention.value_length": None,
        "rope.dimension_count": int(rope["partial_rotary_factor"] * share),
        "rope.scaling.original_context_length": config.original_max_position_embeddings,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if rope["rope_type"] != "longrope":
        return told
    scale = config.max_position_embeddings / config.original_max_position_embeddings
    log = math.log(scale) / math.log(config.original_max_position_embeddings)
    return {**told, "rope.scaling.attn_factor": math.sqrt(1 + log)}


def _gemma3(config: Any) -> dict[str, Any]:
    local, whole = (config.rope_parameters[f"{kind}_attention"] for kind in ("sliding", "full"))
    scaled = whole["rope_type"] == "linear"
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": 1 + config.layer_types.index("full_attention"),
        "rope.freq_base": float(whole["rope_theta"]),
        "rope.freq_base_swa": float(local["rope_theta"]),
        "rope.scaling.type": "linear" if scaled else None,
        "rope.scaling.factor": float(whole["factor"]) if scaled else None,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _add(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif value is not None:
        writer.add_array(name, value)


def _add_tensor(writer: Any, name: str, tensor: torch.Tensor, kind: Any) -> None:
    from gguf import GGMLQuantizationType, quantize

    if kind is None or tensor.dim() < 2 or name.endswith(".bias"):
        writer.add_tensor(name, tensor.numpy())
    elif kind is GGMLQuantizationType.F64:
        writer.add_tensor(name, tensor.double().numpy())
    else:
        writer.add_tensor(name, quantize(tensor.numpy(), kind), raw_dtype=kind)


def _stored(name: str, tensor: torch.Tensor, config: Any, family: Family) -> torch.Tensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kind = name.split(".")[-2]
    if family.gguf.norms_plus_one and kind.endswith("norm"):
        return tensor + 1
    return permuted(tensor, heads[kind]) if family.gguf.pairs and kind in heads else tensor


def gguf_name(name: str, family: Family) -> str:
    """The file's name of a tensor that transformers calls `name`."""
    theirs = {ours: short for short, ours in library_names(family).items()}
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("blk."):
        return name
    if kind == "sinks":
        return f"blk.{stem.split('.')[2]}.attn_sinks.weight"
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{block[1]}.{theirs[block[2]]}.{kind}" if block else f"{theirs[stem]}.{kind}"
