"""The native CPU kernels of a package: which this processor runs, and their C ABI by ctypes.

The structs mirror `kernels/moac_kernels/cpu/abi.h`. Nothing here needs torch or numpy.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_double, c_float, c_int64, c_void_p
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.held import descriptor_path

ABI = 5

# How weights and caches lie in memory, and what the functions return, as abi.h numbers them.
WEIGHTS_PLAIN, WEIGHTS_INT8, WEIGHTS_INT4 = 0, 1, 2
CACHE_PLAIN, CACHE_INT8, CACHE_INT4 = 0, 1, 2
DONE, SHORT_OF_MEMORY, UNKNOWN_FORMAT = 0, 1, 2

_AVX2 = frozenset(("avx2", "fma", "f16c"))
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}

# What each build asks of the processor, by the names of /proc/cpuinfo; best first.
INSTRUCTION_SETS = {
    "avx512bf16": _AVX512 | {"avx512_bf16"},
    "avx512": _AVX512,
    "avx2": _AVX2,
    "arm64": frozenset(("asimd", "asimddp")),
}
CPU_TARGETS = tuple(f"cpu:{name}" for name in INSTRUCTION_SETS)
MOAC_CPU = "MOAC_CPU"  # the environment variable that asks for an instruction set

_LOADED: dict[str, Any] = {}  # packages' libraries by their SHA-256, never unloaded
_WITH_BFLOAT16 = ("avx512bf16",)  # the others multiply bfloat16 as float32


class MatrixStruct(Structure):
    """Where a matrix of weights lies, and how; `scale`: null where its format has none."""

    _fields_ = [("at", c_void_p), ("scale", c_void_p), ("format", c_int64)]


class LayerStruct(Structure):
    """One layer's weights, addresses null where it has none, and its options."""

    _fields_ = [
        *((name, c_void_p) for name in ("attn_norm", "q_norm", "k_norm", "mlp_norm")),
        *((name, c_void_p) for name in ("attn_post_norm", "mlp_post_norm")),
        *((f"{name}_bias", c_void_p) for name in ("attn_norm", "mlp_norm")),
        *((f"{name}_bias", c_void_p) for name in ("attn_post_norm", "mlp_post_norm")),
        *((name, MatrixStruct) for name in ("qkv", "o", "gate_up", "down")),
        *((f"{name}_bias", c_void_p) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("router", "router_bias", "sink_logits")),
        *((name, c_int64) for name in ("inner", "activation", "rope", "plus_one", "centred")),
        *((name, c_int64) for name in ("wide_qk_norm", "parallel")),
        *((name, c_int64) for name in ("experts", "chosen", "normalised", "up_plus_one")),
        *((name, c_double) for name in ("norm_eps", "query_scale", "logit_cap")),
        *((name, c_double) for name in ("activation_slope", "mlp_limit")),
    ]


class ModelStruct(Structure):
    """A model's shape and options, and its weights."""

    _fields_ = [
        *((name, c_int64) for name in ("num_layers", "hidden", "inner", "heads", "kv_heads")),
        *((name, c_int64) for name in ("head_dim", "vocab", "bf16", "num_ropes", "plus_one")),
        ("centred", c_int64),
        *((name, c_double) for name in ("norm_eps", "embedding_scale", "residual_scale")),
        *((name, c_double) for name in ("logit_scale", "logit_cap")),
        *((name, MatrixStruct) for name in ("embed", "head")),
        *((name, c_void_p) for name in ("norm", "norm_bias")),
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
    if sys.platform == "darwin":
        return _apple_features()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    names = ("flags", "Features")  # on x86-64 and on arm64
    flags = next((line for line in text.splitlines() if line.startswith(names)), ":")
    return frozenset(flags.partition(":")[2].split())


def _apple_features() -> frozenset[str]:
    """The same of a Mac, which has no /proc: every Apple chip has NEON, and says of the rest."""
    named = {"asimd": "hw.optional.arm64", "asimddp": "hw.optional.arm.FEAT_DotProd"}
    return frozenset(name for name, key in named.items() if _sysctl(key))


def _sysctl(key: str) -> bool:
    value, size = ctypes.c_int(0), ctypes.c_size_t(4)
    system: Any = ctypes.CDLL(None)
    failed = system.sysctlbyname(
        key.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return not failed and bool(value.value)


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


def choose_set(targets: Iterable[str], asked: str | None = None) -> str:
    """The instruction set to run of a package's targets: the one asked for, else the best.

    `asked`: None is what the environment variable MOAC_CPU says, if anything. Raises UsageError
    for a name that there is not, MoacError where the processor or the package lacks it.
    """
    built = list(targets)
    runnable = runnable_sets(built)
    by = "--cpu" if asked is not None else MOAC_CPU
    name = asked if asked is not None else os.environ.get(MOAC_CPU) or None
    if not runnable:
        raise MoacError(
            "this processor runs none of the package's CPU kernels; run with --backend torch"
        )
    if name is None:
        return runnable[0]
    if name in runnable:
        return name
    if name not in INSTRUCTION_SETS:
        raise UsageError(f"{by} asks for {name!r}, expected one of {', '.join(INSTRUCTION_SETS)}")
    here = f"choose from {', '.join(runnable)}"
    lacking = sorted(INSTRUCTION_SETS[name] - host_features())
    if lacking:
        raise MoacError(
            f"{by} asks for {name}, and this processor lacks {', '.join(lacking)}; {here}"
        )
    raise MoacError(f"{by} asks for {name}, for which the package has no kernels; {here}")


def products(instruction_set: str, dtype: str, *, whole: bool = False) -> str:
    """What weights are multiplied in: float32, bfloat16, or int8 where `whole` numbers are.

    `dtype`: what a package computes in. Whole numbers are multiplied as such in bfloat16 alone.
    """
    if dtype != "bfloat16":
        return dtype
    if whole:
        return "int8"
    return "bfloat16" if instruction_set in _WITH_BFLOAT16 else "float32"


def packaged_library(artifact: Artifact, name: str) -> Any:
    """A trusted package's kernels, out of the very file that was checked.

    Raises as `open_library`.
    """
    digest = artifact.files[name].sha256
    if digest not in _LOADED:
        with _loadable(artifact, name) as path:
            _LOADED[digest] = open_library(path, Path(name).name)
    return _LOADED[digest]


@contextmanager
def _loadable(artifact: Artifact, name: str) -> Iterator[Path]:
    """A path by which the system's linker loads a file that is open."""
    if sys.platform == "darwin":  # a library is loaded from a file with a name of its own
        with TemporaryDirectory(prefix="moac-") as folder:
            path = Path(folder, Path(name).name)
            path.write_bytes(artifact.read(name))
            yield path
        return
    with artifact.open(name) as descriptor:
        # open for good: the linker takes another library of the same path for this one
        yield descriptor_path(os.dup(descriptor))


def open_library(path: Path, name: str | None = None) -> Any:
    """The kernels in a shared object. Raises ArtifactError where this host cannot load it.

    `name`: what it is called, None is what the path says.
    """
    name = name or path.name
    try:
        library: Any = ctypes.CDLL(str(path))
        found = library.moac_abi()
    except (OSError, AttributeError) as error:
        raise ArtifactError(
            f"{name} cannot be loaded ({error}), expected CPU kernels for this host; "
            "run with --backend torch, or compile the package again on a host like this one"
        ) from error
    if found != ABI:
        raise ArtifactError(
            f"{name} speaks version {found} of its interface, expected {ABI}; run the "
            "package by the runtime that it carries (python PACKAGE) or with --backend torch, or "
            "compile it again"
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
