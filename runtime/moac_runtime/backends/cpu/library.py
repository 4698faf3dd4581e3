"""The native CPU kernels of a package: which this processor runs, and their C ABI by ctypes.

The structs mirror `kernels/moac_kernels/cpu/abi.h`. Nothing here needs torch or numpy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable
from ctypes import POINTER, Structure, c_double, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

from moac_runtime.errors import ArtifactError

ABI = 4

# How weights and caches lie in memory, and what the functions return, as abi.h numbers them.
WEIGHTS_PLAIN, WEIGHTS_INT8 = 0, 1
CACHE_PLAIN = 0
DONE, SHORT_OF_MEMORY, UNKNOWN_FORMAT = 0, 1, 2

# What each build asks of the processor, by the names of /proc/cpuinfo; best first.
INSTRUCTION_SETS = {
    "avx512bf16": frozenset(
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx2", "fma", "f16c")
    ),
    "avx2": frozenset(("avx2", "fma", "f16c")),
}
CPU_TARGETS = tuple(f"cpu:{name}" for name in INSTRUCTION_SETS)


class MatrixStruct(Structure):
    """Where a matrix of weights lies, and how; `scale`: null where its format has none."""

    _fields_ = [("at", c_void_p), ("scale", c_void_p), ("format", c_int64)]


class LayerStruct(Structure):
    """One layer's weights, addresses null where it has none, and its options."""

    _fields_ = [
        *((name, c_void_p) for name in ("attn_norm", "q_norm", "k_norm", "mlp_norm")),
        *((name, c_void_p) for name in ("attn_post_norm", "mlp_post_norm")),
        *((name, MatrixStruct) for name in ("qkv", "o", "gate_up", "down")),
        *((f"{name}_bias", c_void_p) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("router", "router_bias", "sink_logits")),
        *((name, c_int64) for name in ("inner", "activation", "rope", "plus_one", "wide_qk_norm")),
        *((name, c_int64) for name in ("experts", "chosen", "normalised", "up_plus_one")),
        *((name, c_double) for name in ("norm_eps", "query_scale", "logit_cap")),
        *((name, c_double) for name in ("activation_slope", "mlp_limit")),
    ]


class ModelStruct(Structure):
    """A model's shape and options, and its weights."""

    _fields_ = [
        *((name, c_int64) for name in ("num_layers", "hidden", "inner", "heads", "kv_heads")),
        *((name, c_int64) for name in ("head_dim", "vocab", "bf16", "num_ropes", "plus_one")),
        *((name, c_double) for name in ("norm_eps", "embedding_scale", "residual_scale")),
        *((name, c_double) for name in ("logit_scale", "logit_cap")),
        *((name, MatrixStruct) for name in ("embed", "head")),
        ("norm", c_void_p),
        ("rope_scalings", POINTER(c_double)),
        ("layers", POINTER(LayerStruct)),
    ]


class CacheStruct(Structure):
    """Where the keys and values of a row and of adjacent KV heads of one span lie, and how."""

    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("first", "heads", "size", "sink", "window")),
        *((name, c_int64) for name in ("shift", "gap", "format")),
    ]


class SegmentStruct(Structure):
    """`count` tokens of a row from position `start` on; its caches and RoPE frequencies."""

    _fields_ = [
        ("caches", POINTER(CacheStruct)),
        ("first_cache", POINTER(c_int64)),
        ("frequencies", POINTER(c_float)),
        *((name, c_int64) for name in ("start", "count")),
    ]


class StepStruct(Structure):
    """One step: tokens, segment after segment, and where the wanted logits go."""

    _fields_ = [
        ("segments", POINTER(SegmentStruct)),
        *((name, POINTER(c_int64)) for name in ("tokens", "wanted", "places")),
        *((name, c_int64) for name in ("num_segments", "num_tokens", "num_wanted")),
        ("logits", c_void_p),
    ]


def integers(values: Iterable[int]) -> Any:
    """The values as a C array of 64-bit integers."""
    found = list(values)
    return (c_int64 * len(found))(*found)


def library_name(instruction_set: str) -> str:
    """The path, inside a package, of the kernels for an instruction set."""
    return f"kernels/cpu/{instruction_set}.so"


def host_features() -> frozenset[str]:
    """What this processor offers, by the names of /proc/cpuinfo; nothing where that is absent."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), ":")
    return frozenset(flags.partition(":")[2].split())


def runnable_sets(targets: Iterable[str], features: Collection[str] | None = None) -> list[str]:
    """The instruction sets of a package's targets that this processor has, best first.

    The target `cpu` stands for all of them.
    """
    found = host_features() if features is None else features
    built = set(targets)
    return [
        name
        for name, needed in INSTRUCTION_SETS.items()
        if ("cpu" in built or f"cpu:{name}" in built) and needed.issubset(found)
    ]


def open_library(path: Path) -> Any:
    """The kernels in a shared object. Raises ArtifactError where this host cannot load it."""
    try:
        library: Any = ctypes.CDLL(str(path))
        found = library.moac_abi()
    except (OSError, AttributeError) as error:
        raise ArtifactError(
            f"{path.name} cannot be loaded ({error}), expected CPU kernels for this host; "
            "run with --backend torch, or compile the package again on a host like this one"
        ) from error
    if found != ABI:
        raise ArtifactError(
            f"{path.name} speaks version {found} of its interface, expected {ABI}; "
            "compile the package again"
        )
    _declare(library)
    return library


def _declare(library: Any) -> None:
    """Types of the functions, so that ctypes passes 64-bit values whole."""
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "moac_open": (c_int64, [POINTER(ModelStruct), c_int64, POINTER(c_void_p)]),
        "moac_serves": (c_int64, [POINTER(CacheStruct), c_int64]),
        "moac_serve": (None, [c_void_p, c_int64]),
        "moac_step": (c_int64, [c_void_p, POINTER(StepStruct)]),
        "moac_close": (None, [c_void_p]),
        "moac_free": (None, [c_void_p]),
        "moac_convert": (None, [c_void_p, c_int64, c_void_p, c_int64, c_int64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
