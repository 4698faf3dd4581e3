"""The dtypes that weights and caches may have: what each is called, and by whom."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtype:
    """`bytes` of an element; its name in `safetensors`; its number in `moac_convert` of the CPU
    kernels.
    """

    bytes: int
    safetensors: str
    number: int


DTYPES = {
    "float32": Dtype(4, "F32", 0),
    "bfloat16": Dtype(2, "BF16", 1),
    "float16": Dtype(2, "F16", 2),
}
DTYPE_BYTES = {name: dtype.bytes for name, dtype in DTYPES.items()}
STORED_BYTES = {dtype.safetensors: dtype.bytes for dtype in DTYPES.values()} | {
    "I8": 1,
    "U8": 1,
}
"""Bytes of an element by safetensors' name, those of 8-bit and 4-bit weights among them."""
