"""Weights of the graph: the package's own safetensors files, referred to byte by byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import TensorProto, numpy_helper
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from moac.export.builder import ELEMENTS, Builder
from moac.export.graph import GraphWeights
from moac.packaging.four_bits import Rounded
from moac_runtime.package.dtypes import DTYPES
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.tensor_header import header_bytes, parse_header
from moac_runtime.package.weight_formats import GROUP
from moac_runtime.package.weights import expected_tensors, scale_name

_STORED = {DTYPES[name].safetensors: element for name, element in ELEMENTS.items()}
_STORED |= {"I8": TensorProto.INT8, "U8": TensorProto.UINT8}
_NARROW = {TensorProto.INT8, TensorProto.UINT8}
_HALF = 8  # what the operator takes off numbers of 4 bits

CONTRIB = "com.microsoft"
"""The domain of onnxruntime's own operators."""

ACCURACY = 4
"""Activations are rounded to 8 bits a block: with float32 ones onnxruntime unpacks the weights
at every step."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file. `location`: from the package's root; the rest in bytes."""

    location: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    length: int


def stored_tensors(package: Path) -> dict[str, Stored]:
    """Every weight of the package at `package`, by name."""
    shards = sorted((package / "weights").glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in _tensors(package, shard)}


def _tensors(package: Path, shard: Path) -> Iterator[tuple[str, Stored]]:
    with shard.open("rb") as file:
        start = file.read(8)
        length = header_bytes(start)
        header = parse_header(file.read(length))
    location = shard.relative_to(package).as_posix()
    for name, told in header.items():
        first, size = len(start) + length + told.first, told.stop - told.first
        yield name, Stored(location, _STORED[told.stored], told.shape, first, size)


def shared_weights(package: Path, dtype: str) -> GraphWeights:
    """Weights read where they lie; the graph casts those that are not stored in `dtype`."""
    source = _Shared(stored_tensors(package), ELEMENTS[dtype])
    return GraphWeights(source.tensor, source.rows, source.linear)


class _Shared:
    def __init__(self, stored: dict[str, Stored], kind: int) -> None:
        self.stored = stored
        self._kind = kind
        self._cast: dict[str, str] = {}

    def tensor(self, b: Builder, name: str) -> str:
        if name not in self._cast:
            self._cast[name] = self._converted(
                b, name, self.reference(b, name), called=f"{name}.cast"
            )
        return self._cast[name]

    def rows(self, b: Builder, name: str, index: str) -> str:
        # the rows are cast, not the table: a runtime need not hold it twice
        return self._converted(b, name, b.op("Gather", self.reference(b, name), index, axis=0))

    def linear(self, b: Builder, x: str, name: str, bias: str | None) -> str:
        biases = [] if bias is None else [self.tensor(b, bias)]
        return b.op("Gemm", x, self.tensor(b, name), *biases, transB=1)

    def _converted(self, b: Builder, name: str, value: str, *, called: str | None = None) -> str:
        if self.stored[name].kind == self._kind:
            return value
        return b.op("Cast", value, to=self._kind, name=called)

    def reference(self, b: Builder, name: str) -> str:
        stored = self.stored[name]
        tensor = TensorProto(name=name, data_type=stored.kind, dims=stored.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key in ("location", "offset", "length"):
            tensor.external_data.add(key=key, value=str(getattr(stored, key)))
        return b.initializer(tensor)


def packed_weights(package: Path, dtype: str, spec: ModelSpec) -> GraphWeights:
    """Weights of 8 and 4 bits, by value where the operator has them in another order."""
    shared = _Shared(stored_tensors(package), ELEMENTS[dtype])
    packed = _Packed(package, shared, expected_tensors(spec))
    return GraphWeights(shared.tensor, packed.rows, packed.linear)


class _Packed:
    """Products by onnxruntime's MatMulNBits, which has `scale * (number - 8)` in 4 bits.

    What is left of a group's offset, `offset + 8 scale`, is multiplied with the sum of the group's
    inputs, a 32nd of the work. Numbers of 8 bits have 128 added, which the operator takes off.
    """

    def __init__(
        self, package: Path, shared: _Shared, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._package, self._shared, self._shapes = package, shared, shapes

    def rows(self, b: Builder, name: str, index: str) -> str:
        rows = self._shared.rows(b, name, index)
        if not self._narrow(name):
            return rows
        scales = b.op("Gather", self._shared.reference(b, scale_name(name)), index, axis=0)
        return b.op("Mul", rows, b.op("Unsqueeze", scales, b.ints(1)))

    def linear(self, b: Builder, x: str, name: str, bias: str | None) -> str:
        if not self._narrow(name):
            return self._shared.linear(b, x, name, bias)
        numbers, scales = self._read(name), self._read(scale_name(name))
        product = self._eight if numbers.dtype == torch.int8 else self._four
        out = product(b, x, name, numbers, scales)
        return out if bias is None else b.op("Add", out, self._shared.tensor(b, bias))

    def _eight(self, b: Builder, x: str, name: str, numbers: Tensor, scales: Tensor) -> str:
        blocks = _blocks(numbers)
        shifted = (blocks.to(torch.int16) + 128).to(torch.uint8)
        return self._product(b, x, name, shifted, scales[:, None].expand(blocks.shape[:2]), 8)

    def _four(self, b: Builder, x: str, name: str, numbers: Tensor, scales: Tensor) -> str:
        columns = self._shapes[name][1]
        rounded = Rounded.of(numbers, scales, columns)
        scale, offset = rounded.scale.float(), rounded.offset.float()
        low, high = _blocks(rounded.numbers).unflatten(2, (-1, 2)).unbind(3)
        product = self._product(b, x, name, low | high << 4, scale, 4)
        sums = b.op("MatMul", x, _group_sums(b, columns))
        rest = _value(b, (offset + _HALF * scale).T, f"{name}.rest")
        return b.op("Add", product, b.op("MatMul", sums, rest))

    def _product(
        self, b: Builder, x: str, name: str, blocks: Tensor, scales: Tensor, bits: int
    ) -> str:
        rows, columns = self._shapes[name]
        return b.op(
            "MatMulNBits",
            x,
            _value(b, blocks, f"{name}.blocks"),
            _value(b, scales, f"{name}.scales"),
            domain=CONTRIB,
            K=columns,
            N=rows,
            bits=bits,
            block_size=GROUP,
            accuracy_level=ACCURACY,
        )

    def _narrow(self, name: str) -> bool:
        return self._shared.stored[name].kind in _NARROW

    def _read(self, name: str) -> Tensor:
        with safe_open(self._package / self._shared.stored[name].location, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _blocks(numbers: Tensor) -> Tensor:
    """Numbers `[out, in]` as blocks `[out, blocks, 32]`, the last filled up with noughts."""
    padded = F.pad(numbers, (0, -numbers.shape[1] % GROUP))
    return padded.view(len(numbers), -1, GROUP)


def _group_sums(b: Builder, columns: int) -> str:
    """A matrix `[in, groups]` of ones and noughts, whose product sums each group."""
    ones = F.one_hot(torch.arange(columns) // GROUP).float()
    return b.once(("group_sums", columns), lambda: _value(b, ones, f"group_sums.{columns}"))


def _value(b: Builder, tensor: Tensor, name: str) -> str:
    return b.initializer(numpy_helper.from_array(tensor.contiguous().numpy(), name))


def readable_weights(package: Path, dtype: str) -> GraphWeights:
    """Weights as `shared_weights`, but linear ones by value, for a quantizer to read."""
    shared = _Shared(stored_tensors(package), ELEMENTS[dtype])
    linear = _Readable(package, shared, dtype).linear
    return GraphWeights(shared.tensor, shared.rows, linear)


class _Readable:
    def __init__(self, package: Path, shared: _Shared, dtype: str) -> None:
        self._package = package
        self._shared = shared
        self._dtype: torch.dtype = getattr(torch, dtype)

    def linear(self, b: Builder, x: str, name: str, bias: str | None) -> str:
        out = b.op("MatMul", x, self._transposed(b, name))
        return out if bias is None else b.op("Add", out, self._shared.tensor(b, bias))

    def _transposed(self, b: Builder, name: str) -> str:
        with safe_open(self._package / self._shared.stored[name].location, "pt") as file:
            value = file.get_tensor(name).to(self._dtype).t().contiguous()
        return b.initializer(numpy_helper.from_array(value.numpy(), f"{name}.transposed"))
