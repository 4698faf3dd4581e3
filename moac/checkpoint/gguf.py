"""A GGUF file as a checkpoint: its header, its weights in floating point and the model of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moac.checkpoint.families import Family, Names, family_of, model_spec
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


def library_names(family: Family) -> dict[str, str]:
    """The library's names of a family's modules by those that llama.cpp gives them."""
    names = family.names
    qkv, gate_up = ("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")
    found = {
        "token_embd": names.embed,
        "output_norm": names.norm,
        "output": names.lm_head,
        "attn_norm": names.attn_norm,
        "post_attention_norm": names.attn_post_norm,
        family.gguf.mlp_norm: names.mlp_norm,
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


@dataclass(frozen=True, slots=True)
class _Piece:
    """What of the library's tensor `name` a tensor of the file is. `index`: the expert that it is
    of all those in the file's. `place`: which of `parts` it is, of experts that the library has in
    one tensor, rows and columns exchanged and the parts' rows beside each other."""

    name: str
    index: int | None = None
    place: int | None = None
    parts: int = 1

    def shape(self, held: Shape) -> Shape:
        """Of the library's tensor, from that of the file's."""
        if self.index is not None:
            return held[1:]
        if self.place is None:
            return held
        count, rows, *columns = held
        return (count, *columns, rows * self.parts)


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
    fields = Fields(path, values | factors)
    shapes: dict[str, Shape] = {}
    for name, shape in found.items():
        held = [] if name in factors else _pieces(name, shape, family)
        # the first part of several stands for all: whether the others are there is seen below
        shapes |= {piece.name: piece.shape(shape) for piece in held if not piece.place}
    _check_parts(path, found, family)
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


def _pieces(name: str, shape: Shape, family: Family) -> list[_Piece]:
    """What a tensor of the file holds of the library's tensors."""
    names, known, parts = family.names, library_names(family), name.split(".")
    prefix = f"{names.layers}.{parts[1]}." if parts[0] == "blk" and len(parts) == 4 else ""
    stem, kind = parts[-2:] if len(parts) > 1 else (name, "")
    if stem == "attn_sinks" and prefix:
        return [_Piece(f"{prefix}{names.sinks}")]
    if stem in _EXPERTS and prefix and names.router:
        return _expert_pieces(prefix, stem, kind, shape, names)
    return [_Piece(f"{prefix}{known[stem]}.{kind}" if stem in known else name)]


_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def _expert_pieces(prefix: str, stem: str, kind: str, shape: Shape, names: Names) -> list[_Piece]:
    """Each expert's own tensor, or a part of one of all of them."""
    place = _EXPERTS.index(stem)
    if names.transposed_experts:
        both, down = names.expert_gate_up[0], names.expert_down
        ending = "_bias" if kind == "bias" else ""
        if stem == _EXPERTS[-1]:
            return [_Piece(f"{prefix}{down}{ending}", place=0)]
        return [_Piece(f"{prefix}{both}{ending}", place=place, parts=2)]
    theirs = f"{prefix}{(*names.expert_gate_up, names.expert_down)[place]}.{kind}"
    return [_Piece(theirs.format(index), index) for index in range(shape[0])]


def _check_parts(path: Path, found: Mapping[str, Shape], family: Family) -> None:
    """Raises CheckpointError where a gate lacks its up or is not of one shape with it."""
    if not family.names.transposed_experts:
        return
    gate, up, _ = _EXPERTS
    for name, shape in found.items():
        for one, other in ((gate, up), (up, gate)):
            partner = name.replace(f".{one}.", f".{other}.")
            if partner != name and found.get(partner) != shape:
                raise CheckpointError(
                    f"{path} holds {name} with shape {list(shape)}, but no {partner} of that "
                    "shape; convert the original checkpoint again"
                )


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

        if name not in self.names():
            raise CheckpointError(f"the checkpoint holds no tensor named {name}")
        if not self._stored:
            for found in _reader(self.path).tensors:
                for piece in _pieces(found.name, _shape(found), family_of(self.spec.family)):
                    self._stored.setdefault(piece.name, {})[piece.place or 0] = piece, found
        held = self._stored[name]
        parts = [_floats(*held[place]) for place in sorted(held)]
        values = parts[0]
        if held[0][0].place is not None:
            values = torch.stack(parts, dim=2).flatten(1, 2)
            values = values.mT.contiguous() if values.dim() == 3 else values
        if family_of(self.spec.family).gguf.norms_plus_one and name.endswith("norm.weight"):
            values -= 1
        return self._in_halves(name, values)

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


def _floats(piece: _Piece, found: Any) -> Tensor:
    """A tensor of the file, or the expert of it that is meant, in float32."""
    import torch
    from gguf import dequantize

    shape, data = _shape(found), found.data
    if piece.index is not None:
        shape, data = shape[1:], data[piece.index]
    return torch.from_numpy(dequantize(data, found.tensor_type).copy()).reshape(shape)
