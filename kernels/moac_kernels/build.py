"""Ahead of time: rendered kernels to cubins, PTX and launch metadata, with no GPU present.

Every architecture gets cubins. One PTX of each kernel, for `compute_80` and PTX ISA 8.0, is the
fallback that CUDA 12 drivers and architectures to come can load; its tiles fit the smallest
shared memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moac_kernels.assembler import resources, tool
from moac_kernels.catalog import SOURCES, Kernel, kernels_of
from moac_kernels.render import render
from moac_kernels.shape import KernelShape
from moac_kernels.tiles import SHARED_LIMITS, Tile, tiles

PORTABLE = "compute_80"
_PTX_VERSION = 80
_PTX_DRIVER = 12000  # PTX ISA 8.0 came with CUDA 12.0
_FIRST_DRIVER = {100: 12080, 120: 12080}  # the first that knows the architecture


class BuildError(RuntimeError):
    """A kernel could not be built; the message is one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Launch metadata of one kernel for one architecture, `kernels/<arch>/<name>.json`.

    `entry`: the function's name in the binary. `arguments`: `[name, type]` in order, and after
    them `null_arguments` pointers that are null. `shared`: bytes of dynamic shared memory;
    `spills`: bytes of local memory a thread; `num_warps`: of 32 threads, a block;
    `max_registers`: the limit a thread was built under, None without one. `cubin`, `ptx`:
    paths inside the package. `driver`: the lowest `cuDriverGetVersion` that loads the binary.
    """

    name: str
    arch: str
    entry: str
    source: str
    arguments: list[list[str]]
    null_arguments: int
    constants: dict[str, int | bool]
    num_warps: int
    num_stages: int
    max_registers: int | None
    registers: int
    shared: int
    spills: int
    cubin: str | None
    ptx: str | None
    driver: int
    triton: str


def write_sources(folder: Path, shape: KernelShape) -> None:
    """Write the rendered kernels and the tables' source into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        (folder / f"{name}.py").write_text(render(name, shape), encoding="utf-8")
    tables = Path(__file__).parent / "tables.py"
    (folder / "tables.py").write_text(tables.read_text(encoding="utf-8"), encoding="utf-8")


def build_kernels(
    folder: Path,
    shape: KernelShape,
    capabilities: Sequence[int],
    *,
    names: Sequence[str] = (),
    workers: int | None = None,
) -> list[Built]:
    """Write sources and build every kernel (or those named) for every capability and the PTX.

    `workers`: architectures built at once, None is one a CPU.
    The same shape, architectures and Triton give the same bytes. Raises BuildError where the
    compiler fails or a kernel needs more shared memory than the architecture has.
    """
    write_sources(folder, shape)
    archs = [(f"sm_{capability}", capability) for capability in capabilities]
    archs.append((PORTABLE, 80))
    kernels = [kernel for kernel in kernels_of(shape) if not names or kernel.name in names]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        made = [pool.submit(_build_arch, folder, shape, *arch, kernels) for arch in archs]
        return [built for group in made for built in group.result()]


def _build_arch(
    folder: Path, shape: KernelShape, arch: str, capability: int, kernels: Sequence[Kernel]
) -> list[Built]:
    target = folder / arch
    target.mkdir()
    limit = min(SHARED_LIMITS.values()) if arch == PORTABLE else SHARED_LIMITS[capability]
    chosen = tiles(shape, limit)
    jobs = [_job(folder, shape, arch, capability, k, chosen[k.name]) for k in kernels]
    _run(jobs, arch)
    return [
        _finish(folder, shape, arch, capability, kernel, chosen[kernel.name], limit)
        for kernel in kernels
    ]


def _job(
    folder: Path, shape: KernelShape, arch: str, capability: int, kernel: Kernel, tile: Tile
) -> dict[str, Any]:
    options = {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
        "enable_fp_fusion": True,  # its default differs between versions of Triton
    }
    if arch == PORTABLE:
        options["ptx_version"] = _PTX_VERSION
    return {
        "source": str(folder / f"{kernel.source}.py"),
        "entry": kernel.entry,
        "signature": kernel.signature(shape),
        "constants": kernel.constants(tile.constants),
        "capability": capability,
        "options": options,
        "stem": str(folder / arch / kernel.name),
    }


def _run(jobs: Sequence[dict[str, Any]], arch: str) -> None:
    """Compile in a fresh process, whose environment says all that the bytes depend on."""
    with tempfile.TemporaryDirectory() as cache:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
        done = subprocess.run(
            [sys.executable, "-m", "moac_kernels.worker"],
            input=json.dumps(jobs),
            env={
                **kept,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "PYTHONDONTWRITEBYTECODE": "1",
                "TRITON_CACHE_DIR": cache,
                "TRITON_DISABLE_LINE_INFO": "1",  # line info would name the build folder
                # The assembler of CUDA 12 for all: newer ones need a CUDA 13 driver.
                "TRITON_PTXAS_BLACKWELL_PATH": str(tool("ptxas")),
            },
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BuildError(f"the kernels could not be built for {arch}: {last}")


def _finish(
    folder: Path,
    shape: KernelShape,
    arch: str,
    capability: int,
    kernel: Kernel,
    tile: Tile,
    limit: int,
) -> Built:
    """Read the assembler's report, drop what is not shipped, write the metadata."""
    stem = folder / arch / kernel.name
    meta, cubin, ptx = (stem.with_suffix(f".{kind}") for kind in ("json", "cubin", "ptx"))
    facts = json.loads(meta.read_text(encoding="utf-8"))
    if facts["shared"] > limit or facts["scratch"]:
        raise BuildError(
            f"the kernel {kernel.name} needs {facts['shared']} bytes of shared memory and "
            f"{facts['scratch']} of scratch, but {arch} gives a block {limit} and none"
        )
    used = resources(cubin)
    portable = arch == PORTABLE
    (cubin if portable else ptx).unlink()
    signature = kernel.signature(shape)
    built = Built(
        name=kernel.name,
        arch=arch,
        entry=facts["entry"],
        source=f"kernels/{kernel.source}.py",
        arguments=[[name, kind] for name, kind in signature.items()],
        null_arguments=facts["arguments"] - len(signature),
        constants=kernel.constants(tile.constants),
        num_warps=facts["num_warps"],
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
        registers=used.registers,
        shared=facts["shared"],
        spills=used.spills,
        cubin=None if portable else f"kernels/{arch}/{kernel.name}.cubin",
        ptx=f"kernels/{PORTABLE}/{kernel.name}.ptx",
        driver=_PTX_DRIVER if portable else _cubin_driver(capability),
        triton=facts["triton"],
    )
    text = json.dumps(asdict(built), indent=2, sort_keys=True)
    meta.write_text(f"{text}\n", encoding="utf-8")
    return built


def _cubin_driver(capability: int) -> int:
    """The assembler's own major version, whose every minor version loads what it makes."""
    done = subprocess.run([tool("ptxas"), "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"release (\d+)\.", done.stdout)
    if match is None:
        raise BuildError(f"ptxas does not tell its version: {done.stdout.strip()!r}")
    return max(int(match[1]) * 1000, _FIRST_DRIVER.get(capability, 0))
