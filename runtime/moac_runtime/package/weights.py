"""Tensors of a package: which ones a spec asks for, and reading them memory-mapped.

A matrix of the format int8 stands there as whole numbers of -127 to 127 and beside it, under
`scale` in place of `weight`, one float32 for each of its rows: weight = number x scale. One of the
format int4 stands there in blocks of 64 columns, the last filled up: byte i of a block's 32 holds
number i, of 0 to 15, in its low half and number 32 + i in its high half; under `scale` stand two
bfloat16 for each group of 32 columns: weight = number x scale + offset.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from moac_runtime.errors import ArtifactError
from moac_runtime.package.artifact import WEIGHT_INDEX, Artifact
from moac_runtime.package.dtypes import DTYPES
from moac_runtime.package.integrity import REMEDY
from moac_runtime.package.manifest import read_json
from moac_runtime.package.spec import LayerSpec, ModelSpec
from moac_runtime.package.tensor_header import read_header
from moac_runtime.package.weight_formats import (
    BLOCK,
    GROUP,
    ROUTER,
    has_format,
    kind_of,
    padded_columns,
)

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

_ROWS = 4096


def expected_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of every weight in a package of `spec`, in writing order."""
    table = (spec.vocab_size, spec.hidden_size)
    shapes: dict[str, Shape] = {"embed.weight": table}
    for layer in range(spec.num_layers):
        own = _layer(spec, spec.layer(layer))
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
    shapes |= _norm("norm", spec.hidden_size, bias=spec.norm.bias)
    return shapes if spec.tied_embeddings else shapes | {"lm_head.weight": table}


@dataclass(frozen=True, slots=True)
class Entry:
    """What a package's file says of a tensor; `stored`: its dtype as safetensors spells it."""

    shape: Shape
    stored: str


def stored_tensors(artifact: Artifact) -> dict[str, Entry]:
    """Every tensor in a package's files by name, scales among them."""
    stored = DTYPES[artifact.dtype].safetensors
    entries: dict[str, Entry] = {}
    for name, shape in expected_tensors(artifact.spec).items():
        plain = not has_format(name, shape)
        form = artifact.dtype if plain else artifact.weight_formats[kind_of(name)]
        entries |= _entries(name, shape, form, stored)
    return entries


def _entries(name: str, shape: Shape, form: str, stored: str) -> dict[str, Entry]:
    """A tensor in a format, and its scales where it has any."""
    if form == "int8":
        return {name: Entry(shape, "I8"), scale_name(name): Entry(shape[:1], "F32")}
    if form == "int4":
        rows, columns = shape[0], padded_columns(shape[1])
        return {
            name: Entry((rows, columns // 2), "U8"),
            scale_name(name): Entry((rows, 2 * columns // GROUP), "BF16"),
        }
    return {name: Entry(shape, stored)}


def packed_names(artifact: Artifact) -> frozenset[str]:
    """The names of the 4-bit weights."""
    entries = stored_tensors(artifact)
    return frozenset(name for name, entry in entries.items() if entry.stored == "U8")


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape is a matrix: norms and biases are none."""
    return len(shape) == 2


def scale_name(name: str) -> str:
    """The name of the scales of an 8-bit or 4-bit weight."""
    return f"{name.removesuffix('weight')}scale"


def load_weights(artifact: Artifact, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every weight by name, on the CPU, memory-mapped; copied only where `dtype` differs.

    Weights of 8 and 4 bits are multiplied out to `dtype`. Raises ArtifactError where a tensor is
    missing, unknown, or of another shape or dtype.
    """
    found = _read(artifact, stored_tensors(artifact))
    shapes = expected_tensors(artifact.spec)
    return {name: _loaded(found, name, shape, dtype) for name, shape in shapes.items()}


def packed_weights(artifact: Artifact) -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    """Numbers and scales of every 4-bit weight as they lie, memory-mapped, and its columns.

    Raises ArtifactError as `load_weights` does.
    """
    stored, shapes = _read(artifact, stored_tensors(artifact)), expected_tensors(artifact.spec)
    return {
        name: (stored[name], stored[scale_name(name)], shapes[name][1])
        for name in sorted(packed_names(artifact))
    }


def _read(artifact: Artifact, expected: Mapping[str, Entry]) -> dict[str, torch.Tensor]:
    """Every tensor of a package as it is stored."""
    found: dict[str, torch.Tensor] = {}
    for shard, names in shards(artifact, expected).items():
        with open_tensors(artifact, shard) as file:
            for name in names:
                _check_entry(file, shard, name, expected[name])
                found[name] = file.get_tensor(name)
    return found


def _loaded(
    found: Mapping[str, torch.Tensor], name: str, shape: Shape, dtype: torch.dtype
) -> torch.Tensor:
    numbers, scales = found[name], found.get(scale_name(name))
    if scales is None:
        return numbers.to(dtype)
    if len(scales.shape) == 1:
        return dequantised(numbers, scales, dtype)
    return unpacked(numbers, scales, shape[1], dtype)


def dequantised(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight `[out, in]` that int8 `numbers` `[out, in]` and float32 `scales` `[out]` mean."""
    weight = numbers.new_empty(numbers.shape, dtype=dtype)
    # in parts, since each is held in float32 on its way
    for part, (some, scale) in zip(
        weight.split(_ROWS),
        zip(numbers.split(_ROWS), scales.split(_ROWS), strict=True),
        strict=True,
    ):
        part.copy_(some * scale[:, None])
    return weight


def unpacked(
    numbers: torch.Tensor, scales: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight `[out, columns]` that 4-bit `numbers` `[out, padded / 2]` and `scales` mean.

    `scales` `[out, 2 padded / 32]`: of each group a bfloat16 scale and offset, side by side.
    """
    weight = numbers.new_empty((len(numbers), columns), dtype=dtype)
    for part, some, pairs in zip(
        weight.split(_ROWS), numbers.split(_ROWS), scales.split(_ROWS), strict=True
    ):
        blocks = some.unflatten(1, (-1, 1, BLOCK // 2))
        halves = blocks.new_empty((*blocks.shape[:2], 2, BLOCK // 2))
        halves[:, :, 0], halves[:, :, 1] = blocks[:, :, 0] & 15, blocks[:, :, 0] >> 4
        scale, offset = pairs.float().unflatten(1, (-1, 1, 2)).unbind(-1)
        wide = halves.flatten(1).unflatten(1, (-1, GROUP)) * scale + offset
        part.copy_(wide.flatten(1)[:, :columns])
    return weight


@contextmanager
def open_tensors(artifact: Artifact, name: str) -> Iterator[Any]:
    """A listed safetensors file, opened for torch. Raises ArtifactError where it is damaged."""
    path = artifact.path(name)
    try:
        read_header(path)  # the library's reader takes the last of two equal names
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError) as error:
        raise no_tensors(name, str(error)) from error


def shards(artifact: Artifact, expected: Mapping[str, Entry]) -> dict[str, list[str]]:
    """Tensor names by the file that holds them, as the index says and the spec expects.

    Raises ArtifactError.
    """
    placed = read_json(artifact.path(WEIGHT_INDEX), WEIGHT_INDEX).get("weight_map")
    if not isinstance(placed, dict):
        raise ArtifactError(f"{WEIGHT_INDEX} lacks weight_map, expected an object: {REMEDY}")
    if missing := next((name for name in expected if name not in placed), None):
        raise ArtifactError(f"{WEIGHT_INDEX} lacks {missing}, expected its file: {REMEDY}")
    if unknown := next((name for name in placed if name not in expected), None):
        raise ArtifactError(f"{WEIGHT_INDEX} names {unknown!r}, unknown to the model: {REMEDY}")
    files: dict[str, list[str]] = defaultdict(list)
    for name in expected:
        files[f"weights/{placed[name]}"].append(name)
    return files


def check_header(shard: str, name: str, expected: Entry, shape: Sequence[int], dtype: str) -> None:
    """Raises ArtifactError where a tensor's `shape` or `dtype` is not as expected."""
    if tuple(shape) != expected.shape:
        raise ArtifactError(
            f"{name} in {shard} has shape {list(shape)}, expected {list(expected.shape)}: {REMEDY}"
        )
    if dtype != expected.stored:
        raise ArtifactError(
            f"{name} in {shard} is stored as {dtype}, expected {expected.stored}: {REMEDY}"
        )


def no_tensors(shard: str, reason: str) -> ArtifactError:
    """What to say of a file that cannot be read as tensors."""
    return ArtifactError(f"{shard} is no safetensors file ({reason}): {REMEDY}")


def missing_tensor(shard: str, name: str) -> ArtifactError:
    """What to say where a file lacks a tensor that the index puts there."""
    return ArtifactError(f"{shard} lacks {name}, expected it as the index says: {REMEDY}")


def _layer(spec: ModelSpec, layer: LayerSpec) -> dict[str, Shape]:
    hidden, queries = spec.hidden_size, spec.num_heads
    keys, dim = spec.num_kv_heads, spec.head_dim

    def norm(name: str, there: bool) -> dict[str, Shape]:
        return _norm(name, hidden, there, bias=layer.norm.bias)

    return {
        **norm("attn_norm", layer.pre_norm),
        **_linear("qkv", (queries + 2 * keys) * dim, hidden, layer.qkv_bias),
        **_qk_norms(spec, layer.qk_norm),
        **({"sink_logits.weight": (queries,)} if layer.sink_logits else {}),
        **_linear("o", hidden, queries * dim, layer.o_bias),
        **norm("attn_post_norm", layer.post_norm),
        **norm("mlp_norm", layer.pre_norm and not layer.parallel),
        **_mlp(hidden, layer),
        **norm("mlp_post_norm", layer.post_norm),
    }


def _mlp(hidden: int, layer: LayerSpec) -> dict[str, Shape]:
    """An MLP, or a router and all experts, one under the other."""
    inner, experts, bias = layer.intermediate_size, layer.experts, layer.mlp_bias
    if experts is None:
        return {
            **_linear("gate_up", 2 * inner, hidden, bias),
            **_linear("down", hidden, inner, bias),
        }
    return {
        **_linear(ROUTER, experts.count, hidden, experts.router_bias),
        **_linear("experts.gate_up", experts.count * 2 * inner, hidden, bias),
        **_linear("experts.down", experts.count * hidden, inner, bias),
    }


def _norm(name: str, width: int, there: bool = True, *, bias: bool = False) -> dict[str, Shape]:
    parts = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{part}": (width,) for part in parts if there}


def _qk_norms(spec: ModelSpec, kind: str | None) -> dict[str, Shape]:
    queries, keys = (spec.num_heads, spec.num_kv_heads) if kind == "width" else (1, 1)
    return {
        **_norm("q_norm", queries * spec.head_dim, kind is not None),
        **_norm("k_norm", keys * spec.head_dim, kind is not None),
    }


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


def _check_entry(file: Any, shard: str, name: str, expected: Entry) -> None:
    """Check a tensor's header entry, before any of its bytes is read."""
    if name not in file.keys():  # noqa: SIM118 - not a dict
        raise missing_tensor(shard, name)
    header = file.get_slice(name)
    check_header(shard, name, expected, header.get_shape(), header.get_dtype())
