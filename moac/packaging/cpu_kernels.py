"""The cpu target of one compile: native kernels for the instruction sets a package serves."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click

from moac.store.kept import KERNELS, Damaged, Header, mark_used, read_folder, write_folder
from moac.store.workspace import told_damaged, unwritable
from moac_kernels.build import BuildError
from moac_kernels.cpu_build import build_cpu, build_key, build_obstacle, host_sets
from moac_runtime.backends.cpu.engine import obstacle
from moac_runtime.backends.cpu.library import CPU_TARGETS, INSTRUCTION_SETS
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.host.cores import default_threads
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.spec import ModelSpec

CPU_NAMES = ("cpu", *CPU_TARGETS)


def cpu_sets(targets: Sequence[str]) -> list[str]:
    """The instruction sets that targets name, best first; `cpu` names those of this host."""
    own = host_sets() if "cpu" in targets else ()
    return [name for name in INSTRUCTION_SETS if name in own or f"cpu:{name}" in targets]


def spelled_out(targets: Sequence[str]) -> list[str]:
    """The targets with `cpu` as the instruction sets that it stood for where it was built."""
    if "cpu" not in targets:
        return list(targets)
    others = [name for name in targets if name.partition(":")[0] != "cpu"]
    return [*others, *(f"cpu:{name}" for name in cpu_sets(targets))]


def cpu_obstacle(
    spec: ModelSpec, dtype: str, instruction_sets: Sequence[str] | None = None
) -> str | None:
    """Why this host cannot build CPU kernels for a model, None where it can.

    `instruction_sets`: None is this host's own.
    """
    if (unserved := obstacle(spec, dtype)) is not None:
        return f"no CPU kernel serves this model: {unserved}"
    return build_obstacle(instruction_sets)


def default_targets(spec: ModelSpec, dtype: str) -> tuple[str, ...]:
    """torch, and cpu where this host can build its kernels; where it cannot, it says why."""
    reason = cpu_obstacle(spec, dtype)
    if reason is None:
        return ("torch", "cpu")
    click.echo(f"note: the package gets no native CPU kernels: {reason}", err=True)
    return ("torch",)


def require_cpu(spec: ModelSpec, dtype: str, targets: Sequence[str]) -> None:
    """Raises UsageError where targets name CPU kernels that cannot be built here."""
    sets = cpu_sets(targets)
    asked = sets or any(target.partition(":")[0] == "cpu" for target in targets)
    reason = cpu_obstacle(spec, dtype, sets or None) if asked else None
    if reason is not None:
        raise UsageError(f"{reason}; leave cpu out of --target")


def emit_cpu_kernels(staging: Path, targets: Sequence[str], kept: Path) -> None:
    """Write `kernels/cpu/` for the cpu targets, if there are any.

    A build does not depend on the model, so it is kept below the folder `kept` for the next
    compile. Raises MoacError.
    """
    folder = staging / "kernels" / "cpu"
    try:
        with ThreadPoolExecutor(default_threads()) as pool:  # a compiler each
            for _, files in pool.map(partial(_built, kept), cpu_sets(targets)):
                folder.mkdir(parents=True, exist_ok=True)
                for file, data in files.items():
                    (folder / file).write_bytes(data)
    except BuildError as error:
        raise MoacError(f"{error}; leave cpu out of --target, and report this") from error


def built_library(kept: Path, name: str) -> Path:
    """The kernels for an instruction set, below the folder `kept`; built where they are not there.

    Beside them lies their record. Raises BuildError, and MoacError where nothing can be written.
    """
    folder, _ = _built(kept, name)
    return folder / f"{name}.so"


def unbuilt(kept: Path, names: Sequence[str]) -> int:
    """How many of the kernels for these instruction sets would have to be built."""
    return sum(not _folder(kept, name).exists() for name in names)


def _folder(kept: Path, name: str) -> Path:
    return kept / f"{KERNELS}-{build_key([name])}"


def _built(kept: Path, name: str) -> tuple[Path, dict[str, bytes]]:
    """The folder of a build and its files, `NAME.so` and `NAME.json`, proven."""
    folder = _folder(kept, name)
    try:
        _, files = read_folder(folder)
    except FileNotFoundError:
        files = None
    except Damaged as reason:
        told_damaged(folder, reason)
        files = None
    try:
        if files is None:
            write_folder(
                folder, Header(KERNELS, build_key([name])), lambda place: build_cpu(place, [name])
            )
            _, files = read_folder(folder)
    except OSError as error:
        raise unwritable(kept, error) from error
    mark_used(folder)
    return folder, files


def packaged_cpu_kernels(artifact: Artifact) -> list[dict[str, Any]]:
    """The record of every build, as `moac_kernels.cpu_build.CpuBuilt`, best first."""
    names = [f"kernels/cpu/{name}.json" for name in INSTRUCTION_SETS]
    return [artifact.json(name) for name in names if name in artifact.files]
