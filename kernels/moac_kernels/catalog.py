"""The kernels of a package: where each is written and what it takes, in order of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moac_kernels.shape import DTYPES, KernelShape


@dataclass(frozen=True, slots=True)
class Kernel:
    """`name`: in the package; `source`: the template; `entry`: the function in it.

    `arguments`: `{argument: type}`, all pointers to 16-byte aligned memory; "x" is the model's
    dtype. What else the function takes are constants: those of `fixed`, and of a tile. `serves`:
    whether a model has a use for it.
    """

    name: str
    source: str
    entry: str
    arguments: Mapping[str, str]
    fixed: Mapping[str, int | bool] = field(default_factory=dict)
    serves: Callable[[KernelShape], bool] = lambda shape: True

    def constants(self, tile: Mapping[str, int | bool]) -> dict[str, int | bool]:
        """What is compiled in: the kernel's own constants and those of a tile."""
        return {**self.fixed, **tile}

    def signature(self, shape: KernelShape) -> dict[str, str]:
        """`{argument: Triton type}`, such as `*bf16`."""
        dtype = DTYPES[shape.dtype][0]
        return {
            name: f"*{dtype if kind == 'x' else kind}" for name, kind in self.arguments.items()
        }


_CACHE = {"keys": "x", "values": "x", "spans": "i32"}
_ROPE = {"qkv": "x", "cos": "fp32", "sin": "fp32", "q_norm": "x", "k_norm": "x"}
_PREFILL = {
    "qkv": "x",
    **_CACHE,
    "rows": "i32",
    "tiles": "i32",
    "sink_logits": "x",
    "out": "x",
}
_DECODE = {
    "qkv": "x",
    **_CACHE,
    "items": "i32",
    "programs": "i32",
    "positions": "i32",
    "partial": "fp32",
    "weight": "fp32",
}
_COMBINE = {"partial": "fp32", "weight": "fp32", "parts": "i32", "sink_logits": "x", "out": "x"}
_KV_WRITE = {"qkv": "x", **_CACHE, "rows": "i32", "token_rows": "i32"}
_NORM = {"x": "x", "weight": "x", "bias": "x", "out": "x"}
_ADD_NORM = {"x": "x", "delta": "x", "post_weight": "x", "post_bias": "x", **_NORM}


def _centred(shape: KernelShape) -> bool:
    return shape.norm_centred


def _root_mean_square(shape: KernelShape) -> bool:
    return not shape.norm_centred


_NORMED = {"NORMED": True}
KERNELS = (
    Kernel("decode", "decode", "decode", _DECODE),
    Kernel("combine", "decode", "combine", _COMBINE),
    Kernel("prefill", "prefill", "prefill", _PREFILL, {"PAST": False}),
    Kernel("prefill_past", "prefill", "prefill", _PREFILL, {"PAST": True}),
    Kernel("rope", "rope", "rope", _ROPE),
    Kernel("rope_decode", "rope", "rope_decode", {**_ROPE, **_CACHE, "positions": "i32"}),
    Kernel(
        "qk_norm",
        "rope",
        "qk_norm",
        {"qkv": "x", "q_norm": "x", "k_norm": "x"},
        serves=lambda shape: shape.qk_norm == "width",
    ),
    Kernel("kv_write", "rope", "kv_write", _KV_WRITE),
    Kernel("rms_norm", "pointwise", "norm", _NORM, serves=_root_mean_square),
    Kernel("layer_norm", "pointwise", "norm", _NORM, serves=_centred),
    Kernel("add_rms_norm", "pointwise", "add_norm", _ADD_NORM, _NORMED, serves=_root_mean_square),
    Kernel("add_layer_norm", "pointwise", "add_norm", _ADD_NORM, _NORMED, serves=_centred),
    Kernel(
        "add",
        "pointwise",
        "add_norm",
        _ADD_NORM,
        {"NORMED": False},
        serves=lambda shape: shape.plain_sums,
    ),
    Kernel("act_mul", "pointwise", "act_mul", {"gate_up": "x", "out": "x"}),
)

SOURCES = tuple(dict.fromkeys(kernel.source for kernel in KERNELS))


def kernels_of(shape: KernelShape) -> list[Kernel]:
    """The kernels that a model runs on, in the order of `KERNELS`."""
    return [kernel for kernel in KERNELS if kernel.serves(shape)]
