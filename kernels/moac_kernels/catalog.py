"""The kernels of a package: where each is written and what it takes, in order of its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moac_kernels.shape import DTYPES, KernelShape


@dataclass(frozen=True, slots=True)
class Kernel:
    """`name`: in the package; `source`: the template; `entry`: the function in it.

    `arguments`: `{argument: type}`, all pointers to 16-byte aligned memory; "x" is the model's
    dtype. What else the function takes are constants.
    """

    name: str
    source: str
    entry: str
    arguments: Mapping[str, str]

    def signature(self, shape: KernelShape) -> dict[str, str]:
        """`{argument: Triton type}`, such as `*bf16`."""
        dtype = DTYPES[shape.dtype][0]
        return {
            name: f"*{dtype if kind == 'x' else kind}" for name, kind in self.arguments.items()
        }


_CACHE = {"keys": "x", "values": "x", "spans": "i32"}
_ROPE = {"qkv": "x", "cos": "fp32", "sin": "fp32", "q_norm": "x", "k_norm": "x"}
_PREFILL = {"qkv": "x", **_CACHE, "rows": "i32", "tiles": "i32", "out": "x"}
_DECODE = {
    "qkv": "x",
    **_CACHE,
    "items": "i32",
    "programs": "i32",
    "positions": "i32",
    "partial": "fp32",
    "weight": "fp32",
}

KERNELS = (
    Kernel("decode", "decode", "decode", _DECODE),
    Kernel(
        "combine",
        "decode",
        "combine",
        {"partial": "fp32", "weight": "fp32", "parts": "i32", "out": "x"},
    ),
    Kernel("prefill", "prefill", "prefill", _PREFILL),
    Kernel("prefill_past", "prefill", "prefill", _PREFILL),
    Kernel("rope", "rope", "rope", _ROPE),
    Kernel("rope_decode", "rope", "rope_decode", {**_ROPE, **_CACHE, "positions": "i32"}),
    Kernel(
        "kv_write", "rope", "kv_write", {"qkv": "x", **_CACHE, "rows": "i32", "token_rows": "i32"}
    ),
    Kernel("rms_norm", "pointwise", "rms_norm", {"x": "x", "weight": "x", "out": "x"}),
    Kernel(
        "add_rms_norm",
        "pointwise",
        "add_rms_norm",
        {"x": "x", "delta": "x", "weight": "x", "out": "x"},
    ),
    Kernel("act_mul", "pointwise", "act_mul", {"gate_up": "x", "out": "x"}),
)

SOURCES = tuple(dict.fromkeys(kernel.source for kernel in KERNELS))
