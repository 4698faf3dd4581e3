"""Tiny random models of every served family and RoPE kind, and a tiny tokenizer beside them.

Everything is seeded. Unlike the library's own initialisation, biases and norms are random too and
attention is peaked, so that a dropped bias, norm, head or key shows in the logits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel

VOCAB = 320
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Lengths are short on purpose: a session of some hundred tokens passes every original context.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 128},
}

# What every tiny config has.
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "mixtral": {"head_dim": 16, "num_local_experts": 8, "sliding_window": None},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [0],
    },
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.0,
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 2,
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 8.0,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 5,
        "sliding_window": 48,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": True,
    },
    "olmo2": {},
    "phi3": {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 128},
    "cohere2": {
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention"],
        "logit_scale": 0.5,
        "layer_norm_eps": 1e-5,
    },
    "stablelm": {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5, "use_qkv_bias": True},
}
FAMILIES = tuple(_FAMILY)
MIXTURES = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss")
"""Those whose MLPs, all or some, are mixtures of experts."""
ONE_ROPE = tuple(name for name in FAMILIES if name != "gemma3_text")
"""Those with one rotary table."""
_PEAKED = ("q_proj.weight", "k_proj.weight", "mlp.gate.weight", "mlp.router.weight")


def ropes_of(family: str) -> tuple[str, ...]:
    """The kinds of `ROPES` that a family's one table may be of."""
    return ("default", "longrope") if family == "phi3" else tuple(ROPES)


def tiny_model(
    family: str, *, rope: str = "default", seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A float32 model in eval mode; `overrides` are fields of the family's config.

    `rope` names an entry of `ROPES`; "dynamic" comes with 64 positions unless overridden.
    """
    values = {**BASE, **_FAMILY[family], "rope_parameters": _rope(family, rope)}
    if rope == "longrope":
        values["rope_parameters"] |= _factors({**values, **overrides})
    if rope == "dynamic":
        values["max_position_embeddings"] = 64
    config = CONFIG_MAPPING[family](**{**values, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
        model: Any = classes[type(config)](config)
        randomise(model)
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


def _rope(family: str, name: str) -> dict[str, Any]:
    if family in ONE_ROPE:
        return {"rope_theta": 10000.0, **ROPES[name]}
    return {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {"rope_theta": 10000.0, **ROPES[name]},
    }


def _factors(values: dict[str, Any]) -> dict[str, Any]:
    """LongRoPE's factors, one for each pair of numbers that rotate together."""
    dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    pairs = range(int(dim * values.get("partial_rotary_factor", 1)) // 2)
    return {
        "short_factor": [1.0 + 0.1 * i for i in pairs],
        "long_factor": [1.5 + 0.5 * i for i in pairs],
    }


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Give every parameter numbers of its own, so that none can be dropped unseen."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith("norm.weight"):
            # about one: what multiplies is one more than the weight where that starts as zero
            parameter.copy_(float(bool(parameter.any())) + 0.2 * noise)
        elif name.endswith("bias") or "embed_tokens" in name or "lm_head" in name:
            parameter.copy_(0.3 * noise)
        elif name.endswith(".sinks"):
            parameter.copy_(1 + noise)
        else:
            # twice the scale on queries and keys: scores of variance 16 before the softmax; and on
            # routers, whose choices then are seldom close
            peak = 2.0 if name.endswith(_PEAKED) else 1.0
            transposed = model.config.model_type == "gpt_oss" and parameter.dim() == 3
            parameter.copy_(peak * noise / parameter.shape[1 if transposed else -1] ** 0.5)


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Its tensors by the names under which a checkpoint has them: each expert's its own."""
    tensors: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())
    return tensors


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "The pass key is hidden in the text. Remember the key, then answer with the key. user "
    tokenizer.train_from_iterator([text, "system assistant the quick brown fox"] * 8, trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `VOCAB` tokens with a chat template; it loses no text."""
    made: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = made(
        tokenizer_object=Tokenizer.from_str(_trained()),
        chat_template=CHAT_TEMPLATE,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
    )
    return tokenizer


def save_checkpoint(model: PreTrainedModel, folder: Path, **save_options: Any) -> Path:
    """Write `model` and the tiny tokenizer as an ordinary checkpoint directory.

    `save_options` go to `save_pretrained`, such as `max_shard_size="100KB"` for several shards.
    """
    model.generation_config.eos_token_id = [2, 0]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder, **save_options)
    tiny_tokenizer().save_pretrained(folder)
    return folder
