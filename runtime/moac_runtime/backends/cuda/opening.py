"""Opening a package on the device: its kernels, its weights, and sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from moac_runtime.backends.cuda.binaries import (
    Binaries,
    Choice,
    Read,
    choose,
    read_binaries,
)
from moac_runtime.backends.cuda.decoder import CudaDecoder
from moac_runtime.backends.cuda.host import NO_GPU
from moac_runtime.backends.cuda.launch import DriverKernels, Kernels
from moac_runtime.backends.cuda.session import CudaSession
from moac_runtime.backends.cuda.source import SourceKernels, can_build, load_source
from moac_runtime.backends.widths import refuse_widths
from moac_runtime.errors import MoacError
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.trust import TRUST_IT, UNTRUSTED
from moac_runtime.package.weights import load_weights

_OLDEST = (8, 0)  # compute capability: what the portable PTX is made for
_PROGRAMS = 2  # of decode on a processor, where nothing tells how many it holds


@dataclass(frozen=True, slots=True)
class CudaModel:
    """A model on the device, a `Backend`. `tables`: the package's `kernels/tables.py`.

    `plan`: the one that sessions run under where they are given no other.
    """

    decoder: CudaDecoder
    plan: Plan
    head_order: Sequence[Sequence[int]]
    tables: Any

    @property
    def dtype(self) -> str:
        """Of weights and caches, by name."""
        return str(self.decoder.dtype).removeprefix("torch.")

    @property
    def kernels(self) -> str:
        """Where the kernels come from: machine code, PTX, or source."""
        return self.decoder.kernels.origin

    def session(self, plan: Plan | None = None) -> CudaSession:
        """A session without rows, under the model's own plan or another one."""
        return CudaSession(self.decoder, plan or self.plan, self.head_order, self.tables)


def open_cuda(artifact: Artifact) -> CudaModel:
    """The package on the current CUDA device, weights and all.

    Raises MoacError where there is no device or no kernel for it, for a plan with widths, or where
    the package is not trusted, and ArtifactError for a damaged one.
    """
    if not artifact.trusted:
        raise MoacError(f"{UNTRUSTED}, and its CUDA kernels are that; {TRUST_IT}")
    refuse_widths(artifact.plan, "cuda")
    device = current_device()
    kernels = open_kernels(artifact.read, read_binaries(artifact), device)
    dtype: torch.dtype = getattr(torch, artifact.dtype)
    weights = load_weights(artifact, dtype)
    decoder = CudaDecoder(artifact.spec, weights, kernels, dtype=dtype, device=device)
    tables = load_source(artifact.read, "kernels/tables.py")
    return CudaModel(decoder, artifact.plan, artifact.head_order, tables)


def device_obstacle(targets: Sequence[str]) -> str | None:
    """Why no package built for `targets` can run here on this backend; None where one may."""
    if not torch.cuda.is_available():
        return NO_GPU
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) >= _OLDEST:
        return None
    return (
        f"this GPU's architecture is sm_{major}{minor}, but the package is built for "
        f"{', '.join(target for target in targets if target.startswith('cuda'))}, which serves "
        f"sm_{_OLDEST[0]}{_OLDEST[1]} and later; run with --backend torch"
    )


def current_device() -> torch.device:
    """The CUDA device in use. Raises MoacError where torch can use none."""
    if not torch.cuda.is_available():
        raise MoacError(NO_GPU)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.empty(1, device=device)  # makes its context the current one, which the driver asks for
    return device


def open_kernels(read: Read, binaries: Binaries, device: torch.device) -> Kernels:
    """The kernels that `read` gives for `device`, in the best form it runs. Raises MoacError."""
    driver = cuda_driver()
    choice = choose(
        binaries,
        capability=torch.cuda.get_device_capability(device),
        driver=None if driver is None else driver_version(driver),
        triton=can_build(),
    )
    return load_kernels(read, choice, device)


def load_kernels(read: Read, choice: Choice, device: torch.device) -> Kernels:
    """The kernels of one form. Raises MoacError where the driver refuses them."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if choice.form == "source":
        return SourceKernels(read, choice.kernels, programs=_PROGRAMS * processors)
    return DriverKernels(
        choice,
        read,
        driver=cuda_driver(),
        stream=lambda: torch.cuda.current_stream(device).cuda_stream,
        processors=processors,
    )


@cache
def cuda_driver() -> Any:
    """The driver's functions, `cuda.bindings.driver`; None without cuda-bindings."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return None
    from cuda.bindings import driver

    return driver


def driver_version(driver: Any) -> int:
    """The newest CUDA that the driver serves: 12080 is 12.8. Raises MoacError."""
    status, found = driver.cuDriverGetVersion()
    if int(status):
        raise MoacError(f"the NVIDIA driver does not tell its version ({status}); update it")
    return int(found)
