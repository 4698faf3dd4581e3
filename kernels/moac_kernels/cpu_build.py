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

# Each build by the compiler's names of what it uses, best first.
INSTRUCTION_SETS = {
    "avx512bf16": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
        *("-mavx2", "-mfma", "-mf16c"),
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
}
_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = (
    *("-std=c++17", "-O3", "-mtune=generic", "-fPIC", "-shared", "-s", "-fvisibility=hidden"),
    *("-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"),
    # the same sources give the same bytes, and no C++ library is asked of a host
    *("-Wl,--build-id=none", "-Wl,--as-needed", "-static-libgcc"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuBuilt:
    """One build, `kernels/cpu/<instruction_set>.json`. `sources`: SHA-256 of the C++ files."""

    instruction_set: str
    library: str
    compiler: str
    flags: list[str]
    sources: str


def build_obstacle() -> str | None:
    """Why the CPU kernels cannot be built here and what to do, None where they can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return (
            "CPU kernels are built on Linux for x86-64, and this is "
            f"{sys.platform} on {platform.machine()}"
        )
    if find_compiler() is None:
        return _no_compiler()
    return None


def find_compiler() -> str | None:
    """The path of the C++ compiler: what CXX names, else g++, c++ or clang++."""
    asked = os.environ.get("CXX")
    names = (asked,) if asked else _COMPILERS
    return next((found for name in names if (found := shutil.which(name))), None)


def _no_compiler() -> str:
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
    obstacle, compiler = build_obstacle(), find_compiler()
    if obstacle is not None or compiler is None:
        raise BuildError(obstacle or _no_compiler())
    folder.mkdir(parents=True, exist_ok=True)
    return [_build(folder, compiler, name) for name in instruction_sets]


def build_key(instruction_sets: Sequence[str]) -> str:
    """What a build's bytes follow from, as a short text to keep them under."""
    parts = (sources_digest(), compiler_version(find_compiler() or ""), _FLAGS, instruction_sets)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def sources_digest() -> str:
    """SHA-256 over the names and contents of the C++ files."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _build(folder: Path, compiler: str, instruction_set: str) -> CpuBuilt:
    target = folder / f"{instruction_set}.so"
    flags = [*_FLAGS, *INSTRUCTION_SETS[instruction_set]]
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
