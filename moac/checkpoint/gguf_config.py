"""What a GGUF header says of the model, as a transformers config; what it cannot say is refused.

Names, defaults and what stands for "none" are those of llama.cpp, which writes these files.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from moac.checkpoint.families import Family, gguf_family, parse_config
from moac.checkpoint.families.options import refuse
from moac.checkpoint.gguf_fields import Fields
from moac_runtime.errors import CheckpointError
from moac_runtime.package.limits import MOST_LAYERS, MOST_SIZE

_ORIGINAL = "use the original checkpoint"
_EPSILONS = {
    "rms_norm_eps": "layer_norm_rms_epsilon",
    "layer_norm_eps": "layer_norm_epsilon",
}
# After `ARCH.`: fields that the config is made of, or that say nothing about the function.
_READ = (
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count"),
    *("rope.freq_base", "attention.layer_norm_epsilon", "tensor_data_layout"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
)
# Fields that change the function unless they hold one of these.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
}
_NONE: tuple[Any, ...] = (0, False, "", [])


def check_fields(fields: Fields) -> Family:
    """The model's family; refuses a file of none, or with a field that would be dropped."""
    kind = fields.text("general.type", "model")
    if kind != "model":
        raise refuse("GGUF file of type", kind, "a model; give the model's own file")
    family, arch = _family(fields), fields.text("general.architecture")
    parts = fields.whole("split.count", 0)
    if parts > 1:
        raise CheckpointError(
            f"{fields.path} is one of {parts} parts of a GGUF file; join them with "
            "`llama-gguf-split --merge FIRST_PART OUT.gguf` and give that file"
        )
    prefix = f"{arch}."
    for name, value in fields.values.items():
        short = name.removeprefix(prefix)
        if short == name or short in _READ or short in family.gguf.fields:
            continue
        if value not in _NEUTRAL.get(short, _NONE):
            raise refuse(f"{name} =", value, f"a GGUF file without it; {_ORIGINAL}")
    return family


def gguf_config(fields: Fields, tensors: Collection[str]) -> Any:
    """The transformers config. `tensors`: names of the file's tensors, as transformers has them.

    Raises CheckpointError for a field that is missing, of a wrong type or not served.
    """
    if "rope_freqs.weight" in tensors:
        raise refuse(
            "the scaling of RoPE by", "rope_freqs.weight", f"a GGUF file without it; {_ORIGINAL}"
        )
    family, arch = _family(fields), fields.text("general.architecture")
    names = family.names
    first = f"{names.layers}.0"
    values = {
        "model_type": family.model_type,
        **_sizes(fields, arch, family),
        family.epsilon: fields.number(f"{arch}.attention.{_EPSILONS[family.epsilon]}"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": fields.number(f"{arch}.rope.freq_base", 10000.0),
        },
        "attention_bias": f"{first}.{names.o}.bias" in tensors,
        "mlp_bias": f"{first}.{names.down}.bias" in tensors,
        "use_qkv_bias": f"{first}.{names.qkv[0]}.bias" in tensors,
        "tie_word_embeddings": f"{names.lm_head}.weight" not in tensors,
        **{f"{name}_token_id": token_id(fields, name) for name in ("bos", "eos")},
        "pad_token_id": token_id(fields, "padding"),
    }
    more = family.gguf.config(fields, values)
    return parse_config({**values, **more}, f"the header of {fields.path}")


def _family(fields: Fields) -> Family:
    arch = fields.text("general.architecture")
    return gguf_family(arch, fields.whole(f"{arch}.expert_count", 0))


def _sizes(fields: Fields, arch: str, family: Family) -> dict[str, int]:
    heads, hidden = (
        _size(fields, f"{arch}.{n}") for n in ("attention.head_count", "embedding_length")
    )
    if hidden < heads:
        raise fields.wrong(f"{arch}.attention.head_count", f"1 to {hidden} heads")
    return {
        "vocab_size": vocab_size(fields),
        "hidden_size": hidden,
        "intermediate_size": _size(fields, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _size(fields, f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(fields, f"{arch}.attention.head_count_kv", heads),
        "max_position_embeddings": _size(fields, f"{arch}.context_length"),
        "head_dim": _head_dim(fields, arch, hidden // heads, family),
    }


def _size(fields: Fields, name: str, *default: int) -> int:
    size: int = fields.whole(name, *default)
    if size < 1:
        raise fields.wrong(name, "a positive number")
    most = MOST_LAYERS if name.endswith(".block_count") else MOST_SIZE
    if size > most:
        raise fields.wrong(name, f"at most {most}")
    return size


def _head_dim(fields: Fields, arch: str, default: int, family: Family) -> int:
    """One size for keys, values and, unless the family reads it, rotation."""
    head_dim = _size(fields, f"{arch}.attention.key_length", default)
    for name in {"attention.value_length", "rope.dimension_count"} - family.gguf.fields:
        found = fields.whole(f"{arch}.{name}", head_dim)
        if found != head_dim:
            raise refuse(f"{arch}.{name}", found, f"that of a key, {head_dim}")
    return head_dim


def vocab_size(fields: Fields) -> int:
    """Rows of the embedding: as stated, else one a listed token."""
    arch, tokens = fields.text("general.architecture"), fields.texts("tokenizer.ggml.tokens")
    size: int = fields.whole(f"{arch}.vocab_size", len(tokens))
    if len(tokens) > size:
        raise CheckpointError(
            f"{fields.path} lists {len(tokens)} tokens for a vocabulary of {size}; convert the "
            "original checkpoint again"
        )
    return size


def token_id(fields: Fields, name: str) -> int | None:
    """The id that the file names as its `bos`, `eos`, `padding`, ... token, None where none is.

    Padding is never fed, so an id outside of the vocabulary says none, as do 32 bits of ones.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    found: int | None = fields.whole(key, None)
    if found is None or found in (-1, 2**32 - 1):
        return None
    size = len(fields.texts("tokenizer.ggml.tokens"))
    if 0 <= found < size:
        return found
    if name == "padding":
        return None
    raise fields.wrong(key, f"an id from 0 to {size - 1}")
