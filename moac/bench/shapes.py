"""Shapes of known models, to fill with random weights, so that speed needs no download."""

from __future__ import annotations

from typing import Any

from moac_runtime.errors import UsageError
from moac_runtime.package.spec import ModelSpec


def _llama(**values: Any) -> dict[str, Any]:
    return {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu", **values}


def _llama3(**values: Any) -> dict[str, Any]:
    return _llama(
        vocab_size=128256,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        **values,
    )


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
    "llama3.2-1b": _llama3(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "vicuna-7b": _llama(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        # the model has 4096; longer contexts are measured too, and speed does not know
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "llama3-8b": _llama3(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
}


def shape_config(name: str) -> Any:
    """The transformers config of a shape. Raises UsageError for an unknown name."""
    if name not in SHAPES:
        raise UsageError(f"there is no shape {name!r}; choose from {', '.join(SHAPES)}")
    from moac.checkpoint.families import parse_config

    return parse_config(SHAPES[name], f"the shape {name}")


def shape_spec(name: str) -> ModelSpec:
    """The spec of a shape. Raises UsageError for an unknown name."""
    from moac.checkpoint.families import model_spec

    return model_spec(shape_config(name))
