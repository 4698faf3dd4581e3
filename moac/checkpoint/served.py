"""What is served and what is refused: options that would change the function are never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moac_runtime.errors import CheckpointError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
DTYPES = ("float32", "bfloat16", "float16")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def refuse(name: str, found: object, served: str) -> CheckpointError:
    """The sentence for an option that is not served."""
    return CheckpointError(f"{name} {found!r} is not served; served is {served}")


def check_config_file(config: Mapping[str, Any]) -> None:
    """Refuse a raw config.json that asks for something not served, before a library reads it."""
    _check_kind(config)
    if config.get("quantization_config"):
        settings = config["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise refuse(
            "quantization_config with quant_method",
            method,
            "float32, bfloat16 or float16 weights, or a GGUF file",
        )
    if config.get("quantization"):
        raise refuse(
            "quantization, as MLX writes it,",
            config["quantization"],
            "float32, bfloat16 or float16 weights, or a GGUF file",
        )
    _check_own_code(config)
    for key in _EXPERTS:
        if config.get(key):
            raise refuse(key, config[key], "a dense MLP (no mixture of experts)")
    for key in _SOFTCAPS:
        if config.get(key):
            raise refuse(key, config[key], "attention and logits without a cap")
    if config.get("pretraining_tp") not in (None, 1):
        raise refuse("pretraining_tp", config["pretraining_tp"], "1 (undivided projections)")
    _check_rope(config)


def _check_kind(config: Mapping[str, Any]) -> None:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise refuse("model_type", family, ", ".join(FAMILIES))
    if config.get("is_encoder_decoder"):
        raise refuse("is_encoder_decoder", True, "decoder-only models")
    named = config.get("architectures") or ["ForCausalLM"]
    architectures = named if isinstance(named, list) else [named]
    if not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise refuse("architecture", architectures[0], "a causal language model (...ForCausalLM)")
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise refuse("hidden_act", activation, ", ".join(ACTIVATIONS))


def _check_own_code(config: Mapping[str, Any]) -> None:
    mapped = config.get("auto_map")
    named = mapped.get("AutoModelForCausalLM") if isinstance(mapped, dict) else None
    if named:
        raise CheckpointError(
            f"config.json names code of its own ({named}), which is not run; served are the "
            "models of transformers, so take auto_map out if the code is a copy of theirs"
        )


def _check_rope(config: Mapping[str, Any]) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise refuse("rope_parameters", rope, "an object with rope_type and its settings")
    if any(isinstance(value, dict) for value in rope.values()):
        raise refuse("RoPE per layer type, for", sorted(rope), "one RoPE for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPES:
        raise refuse("RoPE type", kind, ", ".join(ROPES))
    for values in (config, rope):
        factor = values.get("partial_rotary_factor")
        if factor is not None and factor != 1:
            raise refuse("partial_rotary_factor", factor, "1 (the whole head rotates)")
