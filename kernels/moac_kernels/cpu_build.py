"""Ahead of time: the C++ kernels to one shared object per instruction set, on the build host.

They need nothing of their host but a processor that has the instructions and a C library
(glibc 2.16 or newer); the deployment host compiles nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moac_kernels.build import BuildError

SOURCES = Path(__file__).parent / "cpu"

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    *_AVX2,
)

# Each build by the compiler's names of what it uses, best first.
INSTRUCTION_SETS = {
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "arm64": ("-march=armv8.2-a+dotprod",),
}
_X86, _ARM = "x86_64", "aarch64"
_MACHINES = {"arm64": _ARM}  # the other sets are of x86-64
_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = (
    *("-std=c++17", "-O3", "-mtune=generic", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"),
)
# The same sources give the same bytes, and no C++ library is asked of a host.
_GNU_LINKER = ("-s", "-Wl,--build-id=none", "-Wl,--as-needed", "-static-libgcc")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuBuilt:
    """One build, `kernels/cpu/<instruction_set>.json`. `sources`: SHA-256 of the C++ files."""

    instruction_set: str
    library: str
    compiler: str
    flags: list[str]
    sources: str


def host_sets() -> tuple[str, ...]:
    """The instruction sets of this host's kind of processor, best first; none of another."""
    return tuple(name for name in INSTRUCTION_SETS if _machine(name) == _host())


def build_obstacle(instruction_sets: Sequence[str] | None = None) -> str | None:
    """Why the CPU kernels cannot be built here and what to do, None where they can.

    `instruction_sets`: None is this host's own.
    """
    on_mac = sys.platform == "darwin" and _host() == _ARM
    if not host_sets() or not (sys.platform == "linux" or on_mac):
        return (
            "CPU kernels are built on Linux for x86-64 and arm64 and on arm64 Macs, and this is "
            f"{sys.platform} on {platform.machine()}"
        )
    asked = host_sets() if instruction_sets is None else instruction_sets
    lacking = next((name for name in asked if find_compiler(name) is None), None)
    return None if lacking is None else _no_compiler(lacking)


def find_compiler(instruction_set: str | None = None) -> str | None:
    """The path of the C++ compiler: what CXX names, else g++, c++ or clang++.

    Of an instruction set of another kind of processor it is GNU's cross compiler.
    """
    if instruction_set is not None and _machine(instruction_set) != _host():
        return shutil.which(_cross_compiler(instruction_set)) if sys.platform == "linux" else None
    asked = os.environ.get("CXX")
    names = (asked,) if asked else _COMPILERS
    return next((found for name in names if (found := shutil.which(name))), None)


def _host() -> str:
    """This host's processor, as compilers spell it."""
    return {"AMD64": _X86, "arm64": _ARM}.get(platform.machine(), platform.machine())


def _machine(instruction_set: str) -> str:
    return _MACHINES.get(instruction_set, _X86)


def _cross_compiler(instruction_set: str) -> str:
    return f"{_machine(instruction_set)}-linux-gnu-g++"


def _no_compiler(instruction_set: str) -> str:
    if _machine(instruction_set) != _host():
        name = _cross_compiler(instruction_set)
        return (
            f"CPU kernels for {instruction_set} need the cross compiler {name}, and there is none "
            f"here: install g++-{_machine(instruction_set).replace('_', '-')}-linux-gnu"
        )
    asked = os.environ.get("CXX")
    if asked:
        return (
            f"CPU kernels need a C++ compiler, and CXX names {asked!r}, which is no program here: "
            "set CXX to one, or unset it to use g++"
        )
    return "CPU kernels need a C++ compiler, and there is none here: install g++"


def build_cpu(folder: Path, instruction_sets: Sequence[str]) -> list[CpuBuilt]:
    """Build the kernels for each instruction set into `folder`, made if need be.

    The same sources and compiler give the same bytes. Raises BuildError.
    """
    obstacle = build_obstacle(instruction_sets)
    if obstacle is not None:
        raise BuildError(obstacle)
    folder.mkdir(parents=True, exist_ok=True)
    return [_build(folder, find_compiler(name) or "", name) for name in instruction_sets]


def build_key(instruction_sets: Sequence[str]) -> str:
    """What a build's bytes follow from, as a short text to keep them under."""
    versions = [compiler_version(find_compiler(name) or "") for name in instruction_sets]
    flags = [build_flags(name) for name in instruction_sets]
    parts = (sources_digest(), versions, flags, instruction_sets)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def sources_digest() -> str:
    """SHA-256 over the names and contents of the C++ files."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def build_flags(instruction_set: str) -> list[str]:
    """What the compiler is told, in the order it is told."""
    linking = _GNU_LINKER if sys.platform == "linux" else ()
    return [*_FLAGS, *linking, *INSTRUCTION_SETS[instruction_set]]


def _build(folder: Path, compiler: str, instruction_set: str) -> CpuBuilt:
    target = folder / f"{instruction_set}.so"
    flags = build_flags(instruction_set)
    # from its own folder, so that no path of this host gets in
    done = _run([compiler, *flags, "-o", str(target.resolve()), "engine.cpp"], SOURCES)
    if done.returncode:
        raise BuildError(
            f"{compiler} cannot build the CPU kernels for {instruction_set}: "
            f"{_reason(done.stderr)}"
        )
    built = CpuBuilt(
        instruction_set=instruction_set,
        library=f"kernels/cpu/{instruction_set}.so",
        compiler=compiler_version(compiler),
        flags=flags,
        sources=sources_digest(),
    )
    text = json.dumps(asdict(built), indent=2, sort_keys=True)
    target.with_suffix(".json").write_text(f"{text}\n", encoding="utf-8")
    return built


def _reason(output: str) -> str:
    """The first error a compiler names, in one line."""
    lines = output.splitlines() or ["it gave no reason"]
    return " ".join(next((line for line in lines if "error" in line), lines[0]).split())


def compiler_version(compiler: str) -> str:
    """The first line a compiler says of itself, "" where it says nothing."""
    try:
        return (_run([compiler, "--version"]).stdout.splitlines() or [""])[0]
    except BuildError:
        return ""


def _run(command: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a compiler. Raises BuildError where the system cannot start it."""
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise BuildError(
            f"{command[0]} cannot be started ({error.strerror}); set CXX to a C++ compiler"
        ) from error
