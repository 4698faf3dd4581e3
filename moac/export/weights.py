"""Weights of the graph: the package's own safetensors files, referred to byte by byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto, numpy_helper
from safetensors import safe_open

from moac.export.builder import ELEMENTS, Builder
from moac.export.graph import GraphWeights
from moac_runtime.package.dtypes import DTYPES

_STORED = {DTYPES[name].safetensors: element for name, element in ELEMENTS.items()}


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
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    location = shard.relative_to(package).as_posix()
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            start = 8 + length + begin
            kind, shape = _STORED[entry["dtype"]], tuple(entry["shape"])
            yield name, Stored(location, kind, shape, start, end - begin)


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
                b, name, self._reference(b, name), called=f"{name}.cast"
            )
        return self._cast[name]

    def rows(self, b: Builder, name: str, index: str) -> str:
        # the rows are cast, not the table: a runtime need not hold it twice
        return self._converted(b, name, b.op("Gather", self._reference(b, name), index, axis=0))

    def linear(self, b: Builder, x: str, name: str, bias: str | None) -> str:
        biases = [] if bias is None else [self.tensor(b, bias)]
        return b.op("Gemm", x, self.tensor(b, name), *biases, transB=1)

    def _converted(self, b: Builder, name: str, value: str, *, called: str | None = None) -> str:
        if self.stored[name].kind == self._kind:
            return value
        return b.op("Cast", value, to=self._kind, name=called)

    def _reference(self, b: Builder, name: str) -> str:
        stored = self.stored[name]
        tensor = TensorProto(name=name, data_type=stored.kind, dims=stored.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key in ("location", "offset", "length"):
            tensor.external_data.add(key=key, value=str(getattr(stored, key)))
        return b.initializer(tensor)


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
