"""The floor under a decode step: the bytes it cannot avoid to read, over measured bandwidth."""

from __future__ import annotations

import math

from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.weights import expected_tensors, is_matrix

_SCALE_BYTES = 4


def weight_bytes_read(spec: ModelSpec, itemsize: int, *, int8: bool = False) -> int:
    """Bytes of weights that one step reads: all, but the embedding where it is only looked up.

    `int8`: matrices are read in 8 bits, with a scale a row.
    """
    shapes = expected_tensors(spec)
    if not spec.tied_embeddings:
        del shapes["embed.weight"]
    return sum(
        math.prod(shape) + _SCALE_BYTES * shape[0]
        if int8 and is_matrix(shape)
        else itemsize * math.prod(shape)
        for shape in shapes.values()
    )


def kv_bytes_read(
    spec: ModelSpec, plan: Plan, *, batch: int, capacity: int, length: float, itemsize: int
) -> float:
    """Bytes of keys and values that one step reads when every row holds `length` tokens."""
    spans = (head.size for layer in plan.spans(capacity) for head in layer)
    tokens = sum(min(size, length) for size in spans)
    return batch * tokens * spec.kv_token_bytes(itemsize)


def floor_ms(read_bytes: float, bandwidth_gbs: float) -> float:
    """Milliseconds to read so many bytes at `bandwidth_gbs` 10^9 bytes a second."""
    return read_bytes / bandwidth_gbs / 1e6
