"""The machine: processor, cores, memory, compiler, and the folder that results are kept in."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

from moac.host import cpu_name, memory_bytes
from moac.store.work_dir import default_work_dir
from moac_kernels.cpu_build import build_obstacle, compiler_version, find_compiler, host_sets
from moac_runtime.backends.cpu.library import INSTRUCTION_SETS, host_features
from moac_runtime.errors import MoacError
from moac_runtime.host.cgroup import memory_limit
from moac_runtime.host.cores import usable_cores


def processor() -> dict[str, Any]:
    """Its name, and for each build of the CPU kernels the instructions that it lacks."""
    features = host_features()
    return {
        "name": cpu_name(),
        "architecture": platform.machine(),
        "kernels": {name: sorted(INSTRUCTION_SETS[name] - features) for name in own_sets()},
    }


def own_sets() -> tuple[str, ...]:
    """The instruction sets of this kind of processor; all of them where it is of no known one."""
    return host_sets() or tuple(INSTRUCTION_SETS)


def cores() -> dict[str, Any]:
    """CPUs and cores at hand, their limits, and the threads a backend takes, with the reason."""
    found = usable_cores()
    return {
        "online": found.online,
        "cpus": found.cpus,
        "cores": found.cores,
        "quota": found.quota,
        "omp_num_threads": found.asked,
        "threads": found.threads,
        "reason": found.reason,
    }


def memory() -> dict[str, int | None]:
    """Bytes: of the machine, available now, and at most by the control groups; None unknown."""
    return {
        "total_bytes": memory_bytes("MemTotal"),
        "available_bytes": memory_bytes("MemAvailable"),
        "limit_bytes": memory_limit(),
    }


def compiler() -> dict[str, str | None]:
    """The C++ compiler, and why CPU kernels cannot be built here, None where they can."""
    path = find_compiler()
    return {
        "path": path,
        "version": compiler_version(path) if path else None,
        "obstacle": build_obstacle(),
    }


def work_folder() -> dict[str, Any]:
    """Where stages keep their results; why nothing can be written there, None where it can."""
    try:
        folder = default_work_dir()
    except MoacError as error:
        return {"path": None, "obstacle": str(error), "free_bytes": None}
    standing = next(path for path in (folder, *folder.absolute().parents) if _is_there(path))
    try:
        with tempfile.TemporaryFile(dir=standing):
            obstacle = None
    except OSError as error:
        obstacle = f"{standing}: {error.strerror}; set MOAC_CACHE to a folder that takes files"
    return {"path": str(folder), "obstacle": obstacle, "free_bytes": _free(standing)}


def _is_there(path: Path) -> bool:
    return os.path.lexists(path) or path == path.parent


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
