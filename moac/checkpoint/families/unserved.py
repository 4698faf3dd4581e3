"""Kinds of models that no family can serve: what holds no keys and values of each token as
attention does, and what is no language model alone. Each is named by what its config tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moac_runtime.errors import CheckpointError

# Of each kind: what the model is said to have, the fields and values of layer types that tell it,
# the models that need no such field, and what is served instead.
_LAYER_TYPES = ("layer_types", "layers_block_type", "block_types", "attn_type_list")
_STATE = "state-space layers"
_LINEAR = "linear-attention layers"
_ATTENTION = "models all of whose layers attend to keys and values"
_HEADS = "attention whose heads have keys and values of their own"
_FIELDS = {
    _STATE: (
        *("ssm_cfg", "state_size", "ssm_state_size", "mamba_d_state", "mamba_d_ssm"),
        *("mamba_expand", "lru_width", "hybrid_override_pattern", "conv_L_cache"),
    ),
    _LINEAR: ("linear_num_value_heads", "linear_attn_config", "lightning_config"),
    "latent attention": ("kv_lora_rank", "kv_latent_dim"),
    "a vision tower": ("vision_config", "vision_tower", "vit_config", "visual"),
    "an audio tower": ("audio_config", "audio_encoder_config", "speech_config"),
}
_TYPES = {
    _STATE: ("mamba", "mamba2", "recurrent", "hybrid", "ssm", "conv"),
    _LINEAR: ("linear_attention", "lightning", "kda", "rwkv"),
}
_MODELS = {
    _STATE: (
        *("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2", "falcon_h1"),
        *("recurrent_gemma", "nemotron_h", "granitemoehybrid", "plamo2", "granitehybrid"),
        *("falcon-h1", "lfm2", "lfm2moe"),
    ),
    _LINEAR: (
        *("rwkv", "rwkv6", "rwkv7", "rwkv6qwen2", "arwkv7", "xlstm", "retnet"),
        *("qwen3_next", "qwen3next", "minimax", "kimi_linear", "kimi-linear", "qwen3_5"),
    ),
    "latent attention": (
        *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek2", "minicpm3", "plm"),
    ),
    "a vision tower": (
        *("llava", "mllama", "llama4", "gemma3", "gemma3n", "mistral3", "qwen2_vl", "qwen2vl"),
        *("qwen2_5_vl", "qwen3_vl", "qwen3vl", "paligemma", "idefics3", "smolvlm", "clip"),
        *("internvl", "phi4_multimodal"),
    ),
    "an encoder": (
        *("t5", "umt5", "mt5", "t5encoder", "bart", "mbart", "pegasus", "marian", "m2m_100"),
        *("led", "longt5", "switch_transformers", "whisper", "t5gemma", "fsmt", "prophetnet"),
    ),
}
_SERVED = {
    _STATE: _ATTENTION,
    _LINEAR: _ATTENTION,
    "latent attention": _HEADS,
    "a vision tower": "a model of text alone, such as the text part saved by itself",
    "an audio tower": "a model of text alone, such as the text part saved by itself",
    "an encoder": "decoder-only models",
}


def check_kind(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError, naming the kind, for a raw config.json that no family can serve."""
    name = config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise _refusal("model_type", name, "an encoder", "is_encoder_decoder")
    for kind in _SERVED:
        found = next((f for f in _FIELDS.get(kind, ()) if config.get(f)), None)
        if found is None:
            found = _layer_type(config, _TYPES.get(kind, ()))
        if found is not None:
            raise _refusal("model_type", name, kind, found)
        check_named("model_type", name, kind)


def check_architecture(name: object) -> None:
    """Raises CheckpointError for a GGUF architecture that no family can serve."""
    for kind in _SERVED:
        check_named("GGUF architecture", name, kind)


def check_named(field: str, name: object, kind: str) -> None:
    """Raises CheckpointError where the model `name`, which `field` tells, is of a kind."""
    if name in _MODELS.get(kind, ()):
        raise _refusal(field, name, kind)


def _layer_type(config: Mapping[str, Any], types: tuple[str, ...]) -> str | None:
    """The field and value that tell of a layer of one of `types`."""
    for field in _LAYER_TYPES:
        listed = config.get(field)
        for value in listed if isinstance(listed, list) else ():
            if value in types:
                return f"{field} {value}"
    return None


def _refusal(field: str, name: object, kind: str, told: str | None = None) -> CheckpointError:
    by = "" if told is None else f" ({told})"
    return CheckpointError(
        f"{field} {name!r} has {kind}{by} and is not served; served is {_SERVED[kind]}"
    )
