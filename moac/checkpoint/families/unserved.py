"""Kinds of models that no family can serve: what holds no keys and values of each token as
attention does, and what is no language model alone. Each is named by what its config tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moac_runtime.errors import CheckpointError

# Fields that list what each layer is.
_LAYER_TYPES = ("layer_types", "layers_block_type", "block_types", "attn_type_list")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unserved:
    """A kind: what its models have, and what is served in its place.

    It is told by `fields` of a config, by `layer_types`, and by `names`: a `model_type` or what
    llama.cpp calls an architecture.
    """

    has: str
    served: str
    fields: tuple[str, ...] = ()
    layer_types: tuple[str, ...] = ()
    names: tuple[str, ...]


_ATTENTION = "models all of whose layers attend to keys and values"
_TEXT = "a model of text alone, such as the text part saved by itself"
KINDS = (
    Unserved(
        has="an encoder",
        served="decoder-only models",
        fields=("is_encoder_decoder",),
        names=(
            *("t5", "umt5", "mt5", "t5encoder", "bart", "mbart", "pegasus", "marian", "m2m_100"),
            *("led", "longt5", "switch_transformers", "whisper", "t5gemma", "fsmt", "prophetnet"),
        ),
    ),
    Unserved(
        has="state-space layers",
        served=_ATTENTION,
        fields=(
            *("ssm_cfg", "state_size", "ssm_state_size", "mamba_d_state", "mamba_d_ssm"),
            *("mamba_expand", "lru_width", "hybrid_override_pattern", "conv_L_cache"),
        ),
        layer_types=("mamba", "mamba2", "recurrent", "hybrid", "ssm", "conv"),
        names=(
            *("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2"),
            *("recurrent_gemma", "nemotron_h", "granitemoehybrid", "granitehybrid", "plamo2"),
            *("falcon_h1", "falcon-h1", "lfm2", "lfm2moe"),
        ),
    ),
    Unserved(
        has="linear-attention layers",
        served=_ATTENTION,
        fields=("linear_num_value_heads", "linear_attn_config", "lightning_config"),
        layer_types=("linear_attention", "lightning", "kda", "rwkv"),
        names=(
            *("rwkv", "rwkv6", "rwkv7", "rwkv6qwen2", "arwkv7", "xlstm", "retnet"),
            *("qwen3_next", "qwen3next", "minimax", "kimi_linear", "kimi-linear", "qwen3_5"),
        ),
    ),
    Unserved(
        has="latent attention",
        served="attention whose heads have keys and values of their own",
        fields=("kv_lora_rank", "kv_latent_dim"),
        names=("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek2", "minicpm3", "plm"),
    ),
    Unserved(
        has="a vision tower",
        served=_TEXT,
        fields=("vision_config", "vision_tower", "vit_config", "visual"),
        names=(
            *("llava", "mllama", "llama4", "gemma3", "gemma3n", "mistral3", "paligemma", "clip"),
            *("qwen2_vl", "qwen2vl", "qwen2_5_vl", "qwen3_vl", "qwen3vl", "idefics3", "smolvlm"),
            *("internvl", "phi4_multimodal"),
        ),
    ),
    Unserved(
        has="an audio tower",
        served=_TEXT,
        fields=("audio_config", "audio_encoder_config", "speech_config"),
        names=("qwen2_audio", "voxtral", "granite_speech"),
    ),
)


def check_kind(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError, naming the kind, for a raw config.json that no family can serve."""
    name = config.get("model_type")
    for kind in KINDS:
        told = next(_signs(config, kind), None)
        if told is not None or name in kind.names:
            raise _refusal(f"model_type {name!r}", kind, told)


def check_architecture(name: object) -> None:
    """Raises CheckpointError for a GGUF architecture that no family can serve."""
    for kind in KINDS:
        if name in kind.names:
            raise _refusal(f"GGUF architecture {name!r}", kind, None)


def _signs(config: Mapping[str, Any], kind: Unserved) -> Iterator[str]:
    """What a config tells of the kind: fields, and the types of layers."""
    yield from (field for field in kind.fields if config.get(field))
    for field in _LAYER_TYPES:
        listed = config.get(field)
        types = listed if isinstance(listed, list) else []
        yield from (f"{field} {found}" for found in types if found in kind.layer_types)


def _refusal(model: str, kind: Unserved, told: str | None) -> CheckpointError:
    by = "" if told is None else f" ({told})"
    return CheckpointError(
        f"{model} has {kind.has}{by} and is not served; served is {kind.served}"
    )
