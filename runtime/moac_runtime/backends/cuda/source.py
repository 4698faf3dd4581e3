"""The last resort: a package's kernels from their Triton source, built where they run.

With `TRITON_INTERPRET=1` in the environment before Triton is imported, the same kernels run on
CPU tensors, slowly: so the whole backend is tested without a GPU.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from moac_runtime.backends.cuda.binaries import Binary


class SourceKernels:
    """Kernels that Triton builds at their first launch; see `launch.Kernels`.

    `root`: the package's folder. `kernels`: their metadata, whose tiles are used.
    """

    def __init__(self, root: Path, kernels: Mapping[str, Binary], *, programs: int) -> None:
        self.origin = "triton source"
        self.programs = programs
        self._kernels = kernels
        paths = {kernel.source for kernel in kernels.values()}
        sources = {path: load_source(root / path) for path in sorted(paths)}
        self._functions = {
            name: getattr(sources[kernel.source], kernel.entry) for name, kernel in kernels.items()
        }

    def launch(self, name: str, grid: tuple[int, ...], /, **tensors: Tensor) -> None:
        """Queue the kernel on the current stream."""
        kernel = self._kernels[name]
        options: dict[str, Any] = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
        if kernel.max_registers is not None:
            options["maxnreg"] = kernel.max_registers
        self._functions[name][grid](*kernel.taken(tensors), **kernel.constants, **options)

    def constant(self, name: str, constant: str) -> int:
        """See `launch.Kernels`."""
        return self._kernels[name].constants[constant]


def can_build() -> bool:
    """Whether Triton can build kernels here: it compiles C that launches them, against Python."""
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    compilers = [shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name]
    return find_spec("triton") is not None and header.is_file() and any(compilers)


def load_source(path: Path) -> ModuleType:
    """A Python file of a package as a module of its own, nothing written beside it.

    Raises what running it raises.
    """
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    module = ModuleType(f"moac_package_{digest}_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and Triton look it up
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), module.__dict__)
    return module
