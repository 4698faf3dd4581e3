"""A GGUF file as a checkpoint: its header, its weights in floating point and the model of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families import Names, family_of, model_spec
from moac.checkpoint.families.options import refuse
from moac.checkpoint.gguf_config import check_fields, gguf_config, token_id
from moac.checkpoint.gguf_fields import Fields
from moac.checkpoint.gguf_header import check_header
from moac.checkpoint.gguf_tokenizer import check_tokenizer_fields
from moac.checkpoint.library import attention_of, model_of
from moac.checkpoint.tensors import Shape, expected_tensors
from moac_runtime.errors import CheckpointError
from moac_runtime.package.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
_END_IDS = ("eos", "eot", "eom")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What the file's own header says. `shapes`: under the names that transformers has."""

    path: Path
    fields: Fields
    shapes: Mapping[str, Shape]
    dtype: str

    def end_ids(self) -> list[int]:
        """Every token id that the file says ends an answer."""
        found = [token_id(self.fields, name) for name in _END_IDS]
        return [token for token in found if token is not None]

    def config(self) -> Any:
        """The transformers config that the header amounts to. Raises CheckpointError."""
        return gguf_config(self.fields, self.shapes)


def library_names(names: Names) -> dict[str, str]:
    """The library's names of a family's modules by those that llama.cpp gives them."""
    qkv, gate_up = ("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")
    found = {
        "token_embd": names.embed,
        "output_norm": names.norm,
        "output": names.lm_head,
        "attn_norm": names.attn_norm,
        "post_attention_norm": names.attn_post_norm,
        "ffn_norm": names.mlp_norm,
        "post_ffw_norm": names.mlp_post_norm,
        **dict(zip(qkv if len(names.qkv) > 1 else ("attn_qkv",), names.qkv, strict=True)),
        "attn_output": names.o,
        "attn_q_norm": names.q_norm,
        "attn_k_norm": names.k_norm,
        **dict(
            zip(gate_up if len(names.gate_up) > 1 else ("ffn_up",), names.gate_up, strict=True)
        ),
        "ffn_down": names.down,
        "ffn_gate_inp": names.router,
    }
    return {theirs: ours for theirs, ours in found.items() if ours}


def _expert_names(names: Names) -> dict[str, str]:
    """The library's names of each expert's modules by those that llama.cpp gives all of them."""
    if names.transposed_experts:
        return {}
    gate, up = names.expert_gate_up
    return {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": names.expert_down}


def open_gguf(path: Path) -> GgufFile:
    """Read the header. Raises CheckpointError for a damaged file or something not served."""
    _check_start(path)
    try:
        check_header(path)
        reader = _reader(path)
        values = {name: value.contents() for name, value in reader.fields.items()}
        found = {tensor.name: _shape(tensor) for tensor in reader.tensors}
        kinds = {tensor.tensor_type.name: tensor for tensor in reader.tensors if tensor.data.size}
        factors = {t.name: t.data.flatten().tolist() for t in reader.tensors if t.name in _FACTORS}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a whole GGUF file ({' '.join(str(error).split())}); download it again"
        ) from None
    family = check_fields(Fields(path, values))
    if not family.gguf.factors:
        factors = {}
    fields, names = Fields(path, values | factors), family.names
    shapes: dict[str, Shape] = {}
    for name, shape in found.items():
        held = {} if name in factors else _hf_names(name, shape, names)
        shapes |= {part: shape if at is None else shape[1:] for part, at in held.items()}
    check_tokenizer_fields(fields)
    _check_kinds(kinds)
    return GgufFile(path, fields, shapes, _dtype(set(kinds)))


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(path)


def _check_start(path: Path) -> None:
    """Refuse what is whole, but of another kind: the byte order and the first version."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    if start[:4] != b"GGUF" or len(start) < 8:
        return
    version = int.from_bytes(start[4:], "little")
    if version & 0xFFFF == 0:
        raise refuse("a big-endian GGUF file,", path.name, "little-endian files")
    if version == 1:
        raise refuse("GGUF version", 1, "2 and 3; convert the original checkpoint again")


def _shape(tensor: Any) -> Shape:
    return tuple(int(size) for size in reversed(tensor.shape))


def _hf_names(name: str, shape: Shape, names: Names) -> dict[str, int | None]:
    """The library's names of what lies in a tensor of the file, and where in it: all, or a row."""
    parts, known, experts = name.split("."), library_names(names), _expert_names(names)
    prefix = f"{names.layers}.{parts[1]}." if parts[0] == "blk" and len(parts) == 4 else ""
    stem, kind = parts[-2:] if len(parts) > 1 else (name, "")
    if stem in experts:
        theirs = f"{prefix}{experts[stem]}.{kind}"
        return {theirs.format(index): index for index in range(shape[0])}
    return {f"{prefix}{known[stem]}.{kind}" if stem in known else name: None}


def _dtype(kinds: set[str]) -> str:
    """The dtype to compile in: the file's own, bfloat16 where it is quantised."""
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F32", "F16"} else "bfloat16"


def _check_kinds(tensors: Mapping[str, Any]) -> None:
    """Refuse a kind of number that the library does not widen, tried on one row of each."""
    from gguf import dequantize

    for kind, tensor in tensors.items():
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            raise refuse(
                "GGUF tensor type", kind, "float and the types that are usual for weights"
            ) from None


def load_gguf_model(path: Path, dtype: Any) -> Any:
    """The dequantised model in `dtype`, with the attention that `attention_of` says."""
    import torch

    config = open_gguf(path).config()
    weights = GgufWeights(path, model_spec(config))
    kind: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    state = {name: weights.tensor(name).to(kind) for name in weights.names()}
    return model_of(config, state, kind, attention_of(weights.spec))


@dataclass(frozen=True, slots=True)
class GgufWeights:
    """The tensors in float32, each dequantised when it is read."""

    path: Path
    spec: ModelSpec
    _stored: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        return tuple(expected_tensors(self.spec))

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32. Raises CheckpointError for an unknown name."""
        import torch
        from gguf import dequantize

        if name not in self.names():
            raise CheckpointError(f"the checkpoint holds no tensor named {name}")
        if not self._stored:
            reader = _reader(self.path)
            names = family_of(self.spec.family).names
            for found in reader.tensors:
                for part, index in _hf_names(found.name, _shape(found), names).items():
                    self._stored[part] = found, index
        stored, index = self._stored[name]
        shape, data = _shape(stored), stored.data
        if index is not None:
            shape, data = shape[1:], data[index]
        values = torch.from_numpy(dequantize(data, stored.tensor_type).copy())
        if family_of(self.spec.family).gguf.norms_plus_one and name.endswith("norm.weight"):
            values -= 1
        return self._in_halves(name, values.reshape(shape))

    def _in_halves(self, name: str, values: Tensor) -> Tensor:
        """Rows of queries and keys as transformers rotates them.

        Of some families the file has the two numbers that rotate together beside each other, in
        every head; transformers has them half a head apart.
        """
        family, counts = family_of(self.spec.family), (self.spec.num_heads, self.spec.num_kv_heads)
        heads = zip(family.names.qkv[:2], counts, strict=True) if family.gguf.pairs else ()
        own = next((count for kind, count in heads if f".{kind}." in name), None)
        if own is None:
            return values
        half = self.spec.head_dim // 2
        pairs = values.reshape(own, half, 2, *values.shape[1:])
        return pairs.transpose(1, 2).reshape(values.shape)
