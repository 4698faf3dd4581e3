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

ABI = 2

# What each build asks of the processor, by the names of /proc/cpuinfo; best first.
INSTRUCTION_SETS = {
    "avx512bf16": frozenset(
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx2", "fma", "f16c")
    ),
    "avx2": frozenset(("avx2", "fma", "f16c")),
}
CPU_TARGETS = tuple(f"cpu:{name}" for name in INSTRUCTION_SETS)


class LayerStruct(Structure):
    """Addresses of one layer's weights, null where it has none, and its options."""

    _fields_ = [
        *(
            (name, c_void_p)
            for name in (
                *("attn_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias"),
                *("mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias"),
                *("attn_post_norm", "mlp_post_norm"),
            )
        ),
        *((name, c_int64) for name in ("inner", "activation", "rope", "plus_one", "wide_qk_norm")),
        *((name, c_double) for name in ("norm_eps", "query_scale", "logit_cap")),
    ]


class ScalesStruct(Structure):
    """Addresses of the scales of one layer's 8-bit weights."""

    _fields_ = [(name, c_void_p) for name in ("qkv", "o", "gate_up", "down")]


class ModelStruct(Structure):
    """A model's shape and options, and the addresses of its weights."""

    _fields_ = [
        *((name, c_int64) for name in ("num_layers", "hidden", "inner", "heads", "kv_heads")),
        *((name, c_int64) for name in ("head_dim", "vocab", "bf16")),
        ("norm_eps", c_double),
        *((name, c_void_p) for name in ("embed", "norm", "head")),
        ("layers", POINTER(LayerStruct)),
        *((name, c_void_p) for name in ("embed_scale", "head_scale")),
        ("scales", POINTER(ScalesStruct)),
        *((name, c_int64) for name in ("num_ropes", "plus_one")),
        ("rope_scalings", POINTER(c_double)),
        *((name, c_double) for name in ("embedding_scale", "residual_scale", "logit_scale")),
        ("logit_cap", c_double),
    ]


class CacheStruct(Structure):
    """Where the keys and values of adjacent KV heads of one span lie, and how."""

    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("first", "heads", "size", "sink", "window")),
        *((name, POINTER(c_int64)) for name in ("shifts", "gaps")),
    ]


class SegmentStruct(Structure):
    """`count` tokens of a row from position `start` on."""

    _fields_ = [(name, c_int64) for name in ("row", "start", "count")]


class StepStruct(Structure):
    """One step: tokens, segment after segment, and where the wanted logits go."""

    _fields_ = [
        ("caches", POINTER(CacheStruct)),
        ("first_cache", POINTER(c_int64)),
        ("frequencies", POINTER(c_float)),
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
        "moac_open": (c_void_p, [POINTER(ModelStruct), c_int64]),
        "moac_serve": (None, [c_void_p, c_int64]),
        "moac_step": (c_int64, [c_void_p, POINTER(StepStruct)]),
        "moac_close": (None, [c_void_p]),
        "moac_free": (None, [c_void_p]),
        "moac_convert": (None, [c_void_p, c_int64, c_void_p, c_int64, c_int64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
