"""Kernels of any shape, built once and loaded in every form that the host can run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moac_kernels.build import build_kernels
from moac_kernels.shape import KernelShape
from moac_kernels.tiles import SHARED_LIMITS
from moac_kernels.uncompiled import write_uncompiled
from moac_runtime.backends.cuda.binaries import Choice, Form, read_folder, reading
from moac_runtime.backends.cuda.launch import Kernels
from moac_runtime.backends.cuda.opening import cuda_driver, load_kernels
from moac_runtime.backends.cuda.source import SourceKernels, can_build, load_source
from moac_runtime.errors import MoacError
from on_gpu.setting import Setting

_PORTABLE = "compute_80"
_BLOCK, _PROGRAMS = 16, 6  # of a rehearsal


class Workshop:
    """Kernels by shape, in folders under `root`."""

    def __init__(self, setting: Setting, root: Path) -> None:
        self._setting, self._root = setting, root
        self._folders: dict[KernelShape, Path] = {}
        self._loaded: dict[tuple[KernelShape, Form], Kernels] = {}
        self.architecture = None if setting.interpret else _architecture(setting.device)

    def build(self, shapes: Iterable[KernelShape], *, names: Sequence[str] = ()) -> None:
        """Build what is not built yet, all at once. `names`: of the kernels, all where empty."""
        new = [shape for shape in dict.fromkeys(shapes) if shape not in self._folders]
        for shape in new:
            self._folders[shape] = self._root / f"shape{len(self._folders)}"
        with ThreadPoolExecutor() as pool:
            list(pool.map(partial(self._build, names), new))

    def forms(self) -> list[Form]:
        """What can be launched here, best first. Raises MoacError where nothing can."""
        if self._setting.interpret:
            return ["source"]
        found: list[Form] = [] if cuda_driver() is None else ["cubin", "ptx"]
        if self.architecture not in SHARED_LIMITS:
            found = [form for form in found if form != "cubin"]
        found += ["source"] if can_build() else []
        if not found:
            raise MoacError(
                "kernels are launched by cuda-bindings; run: pip install cuda-bindings"
            )
        return found

    def load(self, shape: KernelShape, form: Form | None = None) -> Kernels:
        """The kernels of a shape, in the best form where none is named."""
        key = (shape, form or self.forms()[0])
        if key not in self._loaded:
            self.build([shape])
            self._loaded[key] = self._load(*key)
        return self._loaded[key]

    def tables(self, shape: KernelShape) -> Any:
        """The tables' source that belongs to the kernels of a shape."""
        self.build([shape])
        return load_source(reading(self._folders[shape]), "kernels/tables.py")

    def _build(self, names: Sequence[str], shape: KernelShape) -> None:
        folder = self._folders[shape] / "kernels"
        if self._setting.interpret:
            write_uncompiled(folder, shape, block=_BLOCK)
        else:
            own = [self.architecture] if self.architecture in SHARED_LIMITS else []
            build_kernels(folder, shape, own, names=names)

    def _load(self, shape: KernelShape, form: Form) -> Kernels:
        root = self._folders[shape]
        binaries = read_folder(root)
        if self._setting.interpret:
            return SourceKernels(reading(root), binaries[_PORTABLE], programs=_PROGRAMS)
        arch = f"sm_{self.architecture}" if form == "cubin" else _PORTABLE
        return load_kernels(
            reading(root), Choice(form, arch, binaries[arch]), self._setting.device
        )


def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
