"""Our cuda backend under any plan, on a package's kernels or on those of a shape, built here."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from moac.bench.system import Subject
from moac.packaging.fuse import head_order
from moac.packaging.kernels import require_kernels
from moac_kernels.build import build_kernels
from moac_kernels.shape import KernelShape
from moac_kernels.tiles import SHARED_LIMITS
from moac_runtime.backends.cuda.binaries import read_folder, reading
from moac_runtime.backends.cuda.decoder import CudaDecoder
from moac_runtime.backends.cuda.opening import CudaModel, current_device, open_cuda, open_kernels
from moac_runtime.backends.cuda.source import load_source
from moac_runtime.host.cores import default_threads
from moac_runtime.package.artifact import open_artifact


def open_subject(subject: Subject, weights: dict[str, torch.Tensor] | None) -> CudaModel:
    """The subject's model on the device. `weights`: of a shape, None where there is a package."""
    if weights is None:
        return open_cuda(open_artifact(subject.package or "", check="sizes"))
    device = current_device()
    shape = require_kernels(subject.spec, subject.plan, subject.dtype)
    root = Path(_built(shape, _architectures(device)).name)
    kernels = open_kernels(reading(root), read_folder(root), device)
    tables = load_source(reading(root), "kernels/tables.py")
    dtype: torch.dtype = getattr(torch, subject.dtype)
    decoder = CudaDecoder(subject.spec, weights, kernels, dtype=dtype, device=device)
    return CudaModel(decoder, subject.plan, head_order(subject.plan), tables)


@cache
def _built(shape: KernelShape, architectures: tuple[int, ...]) -> TemporaryDirectory[str]:
    """A folder with the shape's kernels, there until the process ends."""
    folder = TemporaryDirectory(prefix="moac-bench-")
    build_kernels(Path(folder.name) / "kernels", shape, architectures, workers=default_threads())
    return folder


def _architectures(device: torch.device) -> tuple[int, ...]:
    """The device's own, where machine code can be built for it; PTX serves the others."""
    major, minor = torch.cuda.get_device_capability(device)
    own = 10 * major + minor
    return (own,) if own in SHARED_LIMITS else ()
