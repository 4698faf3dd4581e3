"""Native kernels of this host's own, for packages whose code must not run here."""

from __future__ import annotations

import sys
from pathlib import Path

from moac_runtime.errors import MoacError


def own_library(instruction_set: str) -> Path:
    """The library for an instruction set, built from moac's sources and kept in the work folder.

    Raises MoacError where there is no compiler, or nothing can be kept.
    """
    # here, since few runs of a package need any of it
    from moac.packaging.cpu_kernels import built_library, unbuilt
    from moac.store.work_dir import default_work_dir
    from moac_kernels.build import BuildError
    from moac_kernels.cpu_build import build_obstacle

    reason = build_obstacle([instruction_set])
    if reason is not None:
        raise MoacError(reason)
    kept = default_work_dir()
    if unbuilt(kept, [instruction_set]):
        print(f"building CPU kernels for {instruction_set}, once", file=sys.stderr, flush=True)
    try:
        return built_library(kept, instruction_set)
    except BuildError as error:
        raise MoacError(str(error)) from error
