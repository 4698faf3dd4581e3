"""A GGUF file as a checkpoint: transformers dequantises it, what it would drop is refused."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moac.checkpoint.served import refuse
from moac.checkpoint.tensors import Shape, expected_tensors
from moac_runtime.errors import CheckpointError
from moac_runtime.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Byte-level pre-tokenizers that transformers builds rightly from the GGUF's name for them.
_PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What the file's own header says. `fields`: metadata, arrays left out; `shapes`: HF names."""

    path: Path
    fields: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    dtype: str

    def end_ids(self) -> list[int]:
        """Every token id that the file says ends an answer."""
        found = [self.fields.get(f"tokenizer.ggml.{name}") for name in _END_IDS]
        return [int(token) for token in found if token is not None]


def open_gguf(path: Path) -> GgufFile:
    """Read the header. Raises CheckpointError for a damaged file or something not served."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {
            name: value.contents() for name, value in reader.fields.items() if len(value.data) == 1
        }
        shapes = {
            _hf_name(tensor.name): tuple(int(size) for size in reversed(tensor.shape))
            for tensor in reader.tensors
        }
        kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a whole GGUF file ({' '.join(str(error).split())}); download it again"
        ) from None
    _check_fields(fields)
    return GgufFile(path, fields, shapes, _dtype(kinds))


def _hf_name(name: str) -> str:
    parts = name.split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" and len(parts) == 4 else ""
    stem, kind = parts[-2:] if len(parts) > 1 else (name, "")
    return f"{prefix}{_NAMES[stem]}.{kind}" if stem in _NAMES else name


def _dtype(kinds: set[str]) -> str:
    """The dtype to compile in: the file's own, bfloat16 where it is quantised."""
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F32", "F16"} else "bfloat16"


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Refuse metadata that changes the function and that transformers does not read."""
    arch = fields.get("general.architecture")
    if arch not in ("llama", "mistral", "qwen2", "qwen3"):
        raise refuse("GGUF architecture", arch, "llama, mistral, qwen2, qwen3")
    if fields.get(f"{arch}.expert_count"):
        raise refuse("expert_count", fields[f"{arch}.expert_count"], "a dense MLP")
    if fields.get(f"{arch}.rope.scaling.type", "none") != "none":
        kind = fields[f"{arch}.rope.scaling.type"]
        raise refuse(
            "RoPE scaling in a GGUF file,", kind, "plain RoPE there; use the original checkpoint"
        )
    if fields.get(f"{arch}.attention.sliding_window"):
        window = fields[f"{arch}.attention.sliding_window"]
        raise refuse(
            "a sliding window in a GGUF file,",
            window,
            "full attention there; use the original checkpoint",
        )
    _check_tokenizer_fields(fields)


def _check_tokenizer_fields(fields: Mapping[str, Any]) -> None:
    kind = fields.get("tokenizer.ggml.model")
    if kind == "llama":
        return
    if kind != "gpt2":
        raise refuse("GGUF tokenizer", kind, "gpt2 (byte-level BPE), llama (sentencepiece)")
    name = fields.get("tokenizer.ggml.pre")
    if name not in _PRE_TOKENIZERS:
        raise refuse(
            "GGUF pre-tokenizer",
            name,
            f"{', '.join(_PRE_TOKENIZERS)}; use the original checkpoint",
        )


def gguf_config(file: GgufFile) -> Any:
    """The transformers config that the header amounts to."""
    from transformers import AutoConfig

    if "rope_freqs.weight" in file.shapes:
        raise refuse(
            "RoPE scaling in a GGUF file,",
            "rope_freqs.weight",
            "plain RoPE there; use the original checkpoint",
        )
    try:
        config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as error:  # what damage raises in the library is not its contract
        raise _unusable(file, "metadata", error) from None
    return config


def gguf_tokenizer(file: GgufFile) -> Any:
    """The file's tokenizer, splitting text as the name of its pre-tokenizer says."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise _unusable(file, "tokenizer", error) from None
    if file.fields.get("tokenizer.ggml.pre") == "smollm":
        # transformers takes it for GPT-2's; SmolLM splits digits first ("a  1": "a", "  ", "1").
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return tokenizer


def _unusable(file: GgufFile, part: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the {part} of {file.path} is not usable ({' '.join(str(error).split())[:300]}); "
        "download it again"
    )


def load_gguf_model(path: Path, dtype: Any) -> Any:
    """The dequantised model in `dtype`, with scaled-dot-product attention."""
    from transformers import AutoModelForCausalLM, GgufConfig

    # the dequantiser's progress bar has no switch of its own
    with redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            attn_implementation="sdpa",
            quantization_config=GgufConfig(dequantize=True),
        )


@dataclass(frozen=True, slots=True)
class GgufWeights:
    """The dequantised tensors in float32, loaded together on the first read."""

    path: Path
    spec: ModelSpec
    _loaded: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        return tuple(expected_tensors(self.spec))

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32. Raises CheckpointError for an unknown name."""
        if name not in self.names():
            raise CheckpointError(f"the checkpoint holds no tensor named {name}")
        if not self._loaded:
            self._loaded.update(load_gguf_model(self.path, "float32").state_dict())
        tensor: Tensor = self._loaded[name]
        return tensor
