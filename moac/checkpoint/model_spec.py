"""A transformers config as a `ModelSpec`; RoPE frequencies come from the library's own module."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from moac.checkpoint.library import quiet_library
from moac.checkpoint.served import check_config_file, refuse
from moac_runtime.errors import CheckpointError
from moac_runtime.package.spec import ModelSpec, RopeSpec

_ROTARY = {
    "llama": "LlamaRotaryEmbedding",
    "mistral": "MistralRotaryEmbedding",
    "qwen2": "Qwen2RotaryEmbedding",
    "qwen3": "Qwen3RotaryEmbedding",
}

# The largest value of each that is read as meant; beyond it a config is damaged.
_SIZES = {
    "num_hidden_layers": 10_000,
    "hidden_size": 2**31,
    "intermediate_size": 2**31,
    "num_attention_heads": 2**31,
    "num_key_value_heads": 2**31,
    "vocab_size": 2**31,
    "max_position_embeddings": 2**31,
}


def parse_config(values: dict[str, Any], where: str) -> Any:
    """The transformers config of a raw config.json, `where` naming it for the sentence.

    Older files (`rope_theta`, `rope_scaling`, `torch_dtype`) are upgraded as transformers does.
    """
    check_config_file(values)
    from transformers import CONFIG_MAPPING

    try:
        with quiet_library():
            return CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
    except Exception as error:  # what a wrong value raises in the library is not its contract
        raise CheckpointError(
            f"{where} is not a valid {values['model_type']} config ({_one_line(error)}); "
            "restore it from the original checkpoint"
        ) from None


def model_spec(config: Any) -> ModelSpec:
    """The spec of a served config. Raises CheckpointError naming what is not served."""
    check_config_file(config.to_dict())
    family = config.model_type
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    _check_sizes(config)
    attention_bias = bool(getattr(config, "attention_bias", False))
    rope = _rope_spec(config)
    return ModelSpec(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(config),
        vocab_size=config.vocab_size,
        context=_context(config),
        norm_eps=config.rms_norm_eps,
        activation=config.hidden_act,
        # Mistral has no biases and Qwen2 always has q, k, v biases, whatever config.json says.
        qkv_bias={"mistral": False, "qwen2": True}.get(family, attention_bias),
        o_bias={"mistral": False, "qwen2": False}.get(family, attention_bias),
        mlp_bias=family == "llama" and bool(config.mlp_bias),
        qk_norm=family == "qwen3",
        tied_embeddings=bool(config.tie_word_embeddings),
        windows=_windows(config),
        rope=rope,
    )


def _check_sizes(config: Any) -> None:
    for name, limit in _SIZES.items():
        if not 1 <= getattr(config, name) <= limit:
            raise CheckpointError(
                f"config.json says {name} {getattr(config, name)} where 1 to {limit} was "
                "expected; restore it from the original checkpoint"
            )
    if not 0 <= config.rms_norm_eps < math.inf:
        raise CheckpointError(
            f"config.json says rms_norm_eps {config.rms_norm_eps} where a small positive number "
            "was expected; restore it from the original checkpoint"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json says {heads} attention heads over {kv_heads} key-value heads, which do "
            "not divide; restore it from the original checkpoint"
        )
    head_dim = _head_dim(config)
    if not 2 <= head_dim <= 1024 or head_dim % 2:
        raise refuse("head_dim", head_dim, "an even head size from 2 to 1024")


def _head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _windows(config: Any) -> tuple[int | None, ...]:
    """Each layer's own sliding window in tokens, as the family's model class applies it."""
    layers: int = config.num_hidden_layers
    if config.model_type == "llama":
        return (None,) * layers
    window: int | None = config.sliding_window
    if window is not None and window < 1:
        raise refuse("sliding_window", window, "a positive number of tokens, or null")
    if config.model_type == "mistral":
        return (window,) * layers
    return tuple(_layer_window(kind, window) for kind in _layer_types(config))


def _layer_types(config: Any) -> list[str]:
    if len(config.layer_types) != config.num_hidden_layers:
        raise CheckpointError(
            f"config.json lists {len(config.layer_types)} layer_types for "
            f"{config.num_hidden_layers} layers; restore it from the original checkpoint"
        )
    return list(config.layer_types)


def _layer_window(kind: str, window: int | None) -> int | None:
    if kind == "full_attention":
        return None
    if kind != "sliding_attention":
        raise refuse("layer type", kind, "full_attention, sliding_attention")
    if window is None:
        raise CheckpointError(
            "config.json asks for sliding_attention layers without a sliding_window (or with "
            "use_sliding_window false); set both or make the layers full_attention"
        )
    return window


def _context(config: Any) -> int:
    """The longest sequence in tokens: what the library documents a scaling to stretch it to."""
    rope, positions = config.rope_parameters, int(config.max_position_embeddings)
    if rope["rope_type"] in ("linear", "dynamic"):
        return int(rope["factor"] * positions)
    if rope["rope_type"] == "yarn" and rope["factor"]:
        return max(positions, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return positions


def _rope_spec(config: Any) -> RopeSpec:
    rope, family = config.rope_parameters, config.model_type
    if rope["rope_type"] in ("linear", "dynamic") and not _is_factor(rope.get("factor")):
        raise refuse("RoPE factor", rope.get("factor"), "a number of at least 1")
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    try:
        rotary = getattr(module, _ROTARY[family])(config)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"the RoPE settings {rope} are incomplete or impossible ({_one_line(error)}); "
            "restore config.json from the original checkpoint"
        ) from None
    inv_freq = tuple(float(value) for value in rotary.inv_freq.float())
    if not all(math.isfinite(value) for value in inv_freq):
        raise CheckpointError(
            f"the RoPE settings {rope} give frequencies that are not finite; "
            "restore config.json from the original checkpoint"
        )
    dynamic = rope["rope_type"] == "dynamic"
    return RopeSpec(
        kind=rope["rope_type"],
        theta=float(rope["rope_theta"]),
        inv_freq=inv_freq,
        scaling=float(rotary.attention_scaling),
        factor=float(rope["factor"]) if dynamic else 1.0,
        original_context=int(config.max_position_embeddings) if dynamic else None,
    )


def _is_factor(value: object) -> bool:
    return isinstance(value, (int, float)) and 1 <= value < math.inf


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
