"""The floor under a decode step: the bytes it cannot avoid to read, over measured bandwidth."""

from __future__ import annotations

import math

from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.weight_formats import (
    GROUP,
    format_of,
    has_format,
    kind_of,
    padded_columns,
)
from moac_runtime.package.weights import Shape, expected_tensors

_SCALE_BYTES = 4  # of a row in 8 bits, and scale and offset of a group in 4


def weight_bytes_read(spec: ModelSpec, itemsize: int, *, weights: str = "full") -> int:
    """Bytes of weights that one step reads: all, but the embedding where it is only looked up.

    Of experts those chosen for one row: several rows may choose the same. `weights`: "full", of
    `itemsize` bytes each, or "int8" or "int4", with scales.
    """
    shapes = expected_tensors(spec)
    if not spec.tied_embeddings:
        del shapes["embed.weight"]
    return sum(
        _bytes(name, _read(spec, name, shape), itemsize, weights) for name, shape in shapes.items()
    )


def _bytes(name: str, shape: Shape, itemsize: int, weights: str) -> int:
    if weights == "full" or not has_format(name, shape):
        return itemsize * math.prod(shape)
    rows, columns = shape
    if format_of(kind_of(name), weights) == "int8":
        return rows * (columns + _SCALE_BYTES)
    columns = padded_columns(columns)
    return rows * (columns // 2 + _SCALE_BYTES * columns // GROUP)


def _read(spec: ModelSpec, name: str, shape: Shape) -> Shape:
    """Of a weight of this shape, what one row's step reads."""
    own = None if ".experts." not in name else spec.layer(int(name.split(".")[1])).experts
    return shape if own is None else (shape[0] // own.count * own.chosen, *shape[1:])


def kv_bytes_read(
    spec: ModelSpec, plan: Plan, *, batch: int, capacity: int, length: float, itemsize: int
) -> float:
    """Bytes of keys and values that one step reads when every row holds `length` tokens."""
    kv = spec.kv_shape(itemsize)
    heads = (head for layer in plan.spans(capacity) for head in layer)
    return batch * sum(min(head.size, length) * kv.token_bytes(head.bits) for head in heads)


def floor_ms(read_bytes: float, bandwidth_gbs: float) -> float:
    """Milliseconds to read so many bytes at `bandwidth_gbs` 10^9 bytes a second."""
    return read_bytes / bandwidth_gbs / 1e6
