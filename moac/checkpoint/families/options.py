"""What is served and what is refused: options that would change the function are never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moac.checkpoint.families.family import Family
from moac_runtime.errors import CheckpointError
from moac_runtime.package.activations import ACTIVATIONS

ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

# Fields that change the function of models that have them: refused unless the family reads them.
_OPTIONS = {
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts"),
        "a dense MLP (no mixture of experts)",
    ),
    **dict.fromkeys(
        ("attn_logit_softcapping", "final_logit_softcapping"), "attention and logits without a cap"
    ),
    "use_bidirectional_attention": "attention to earlier tokens alone",
}


def refuse(name: str, found: object, served: str) -> CheckpointError:
    """The sentence for an option that is not served."""
    return CheckpointError(f"{name} {found!r} is not served; served is {served}")


def check_config_file(config: Mapping[str, Any], family: Family) -> None:
    """Refuse a raw config.json that asks for something not served, before a library reads it."""
    _check_kind(config, family)
    if config.get("quantization_config"):
        settings = config["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if method != "mxfp4" or not family.mxfp4:
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
    for key, served in _OPTIONS.items():
        if config.get(key) and key not in family.options:
            raise refuse(key, config[key], served)
    if config.get("pretraining_tp") not in (None, 1) and "pretraining_tp" not in family.options:
        raise refuse("pretraining_tp", config["pretraining_tp"], "1 (undivided projections)")
    _check_ropes(config, family)


def _check_kind(config: Mapping[str, Any], family: Family) -> None:
    named = config.get("architectures") or ["ForCausalLM"]
    architectures = named if isinstance(named, list) else [named]
    if not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise refuse("architecture", architectures[0], "a causal language model (...ForCausalLM)")
    if family.activation in config:
        activation_of(family.activation, config[family.activation])


def activation_of(field: str, name: object) -> str:
    """Our name of an activation that the library calls `name`. Raises CheckpointError."""
    known = {theirs: ours for ours, one in ACTIVATIONS.items() for theirs in one.library}
    if not isinstance(name, str) or name not in known:
        raise refuse(field, name, ", ".join(known))
    return known[name]


def _check_own_code(config: Mapping[str, Any]) -> None:
    mapped = config.get("auto_map")
    named = mapped.get("AutoModelForCausalLM") if isinstance(mapped, dict) else None
    if named:
        raise CheckpointError(
            f"config.json names code of its own ({named}), which is not run; served are the "
            "models of transformers, so take auto_map out if the code is a copy of theirs"
        )


def _check_ropes(config: Mapping[str, Any], family: Family) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise refuse("rope_parameters", rope, "an object with rope_type and its settings")
    by_type = [value for value in rope.values() if isinstance(value, dict)]
    if by_type and "rope_parameters" not in family.options:
        raise refuse("RoPE per layer type, for", sorted(rope), "one RoPE for all layers")
    for one in by_type or [rope]:
        _check_rope(config, one, family)


def _check_rope(config: Mapping[str, Any], rope: Mapping[str, Any], family: Family) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPES:
        raise refuse("RoPE type", kind, ", ".join(ROPES))
    for values in (config, rope):
        if "partial_rotary_factor" in family.options:
            break
        factor = values.get("partial_rotary_factor")
        if factor is not None and factor != 1:
            raise refuse("partial_rotary_factor", factor, "1 (the whole head rotates)")
