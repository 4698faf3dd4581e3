"""Which backend runs a package here, and opening it.

A backend's libraries load with it, while other threads check the package's files; a package run
by onnxruntime needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

from moac_runtime.backends.cuda.host import NO_GPU, has_driver
from moac_runtime.backends.session import Backend
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.host.cores import set_torch_threads
from moac_runtime.host.extras import missing
from moac_runtime.package.artifact import Artifact, Opening

BACKENDS = ("cpu", "cuda", "onnx", "torch")  # every name a package or a user may use
RUNNABLE = ("cuda", "cpu", "torch", "onnx")  # those this runtime has, best first

# What each backend but cpu loads; the extra of its name brings it.
_NEEDS = {"cuda": "torch", "torch": "torch", "onnx": "onnxruntime"}


def open_backend(
    package: Artifact | Opening,
    name: str,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    cpu: str | None = None,
    library: Path | None = None,
) -> Backend:
    """Read a package's weights into the backend `name`; of an `Opening`, once it is checked.

    `dtype`: of weights and caches, None is the package's own. `threads`: CPU threads, None is
    every core this process may use. `cpu`: the instruction set of the backend cpu, None is the
    best here. `library`: kernels that run in the place of the package's own. Raises UsageError
    for a dtype that the backend does not compute in, ArtifactError where the package is not whole,
    and MoacError where the backend cannot run here, or would run code of a package that is not
    trusted.
    """
    if name == "cpu":
        return _cpu(package, dtype, threads, cpu, library)
    return _OPENERS[name](package, dtype, threads)


def _checked(package: Artifact | Opening) -> Artifact:
    return package.result() if isinstance(package, Opening) else package


def _torch(package: Artifact | Opening, dtype: str | None, threads: int | None) -> Backend:
    from moac_runtime.backends.torch.opening import open_torch

    set_torch_threads(threads)
    return open_torch(_checked(package), dtype=dtype)


def _onnx(package: Artifact | Opening, dtype: str | None, threads: int | None) -> Backend:
    from moac_runtime.backends.onnx.session import open_onnx

    model = open_onnx(_checked(package), threads=threads)
    if dtype not in (None, model.dtype):
        raise UsageError(
            f"the package's ONNX graph computes in {model.dtype}, not in {dtype}; leave out "
            f"--dtype, or compile the package with --onnx-dtype {dtype}"
        )
    return model


def _cuda(package: Artifact | Opening, dtype: str | None, threads: int | None) -> Backend:
    from moac_runtime.backends.cuda.opening import open_cuda

    set_torch_threads(threads)
    artifact = _checked(package)
    if dtype not in (None, artifact.dtype):
        raise UsageError(
            f"the package's kernels compute in {artifact.dtype}, not in {dtype}; leave out "
            "--dtype, or run with --backend torch"
        )
    return open_cuda(artifact)


def _cpu(
    package: Artifact | Opening,
    dtype: str | None,
    threads: int | None,
    cpu: str | None,
    library: Path | None,
) -> Backend:
    from moac_runtime.backends.cpu.opening import open_cpu

    artifact = _checked(package)
    return open_cpu(artifact, dtype=dtype, threads=threads, instruction_set=cpu, library=library)


_OPENERS = {"cuda": _cuda, "onnx": _onnx, "torch": _torch}


def choose_backend(
    asked: str | None,
    targets: Sequence[str],
    *,
    dtype: str | None = None,
    cpu: str | None = None,
) -> str:
    """The backend to run a package built for `targets` in `dtype`, None for its own.

    One asked for by name is never replaced by another; an instruction set (`cpu`) asks for the
    backend cpu. Raises UsageError or MoacError.
    """
    check_choice("backend", asked, BACKENDS)
    asked = check_cpu(cpu, asked)
    built = {target.partition(":")[0] for target in targets}
    wanted = built if asked is None else {asked}
    runnable = [name for name in RUNNABLE if name in wanted & built]
    if not runnable:
        raise MoacError(
            f"the backend {asked or 'of this package'} cannot run here: the package is built for "
            f"{', '.join(targets)}, and this runtime runs {', '.join(RUNNABLE)}; "
            "choose a backend both name, or compile the package again"
        )
    obstacles = []
    for name in runnable:
        obstacle = backend_obstacle(name, targets, dtype)
        if obstacle is None:
            return name
        obstacles.append(obstacle)
    raise MoacError("; and ".join(obstacles))


def backend_obstacle(backend: str, targets: Sequence[str], dtype: str | None = None) -> str | None:
    """Why a backend that a package is built for cannot run here; None where it can.

    `dtype`: asked for, None is the package's own.
    """
    if backend == "cpu":
        from moac_runtime.backends.cpu.opening import host_obstacle

        return host_obstacle(targets, dtype)
    if backend == "cuda" and "torch" not in sys.modules and not has_driver():
        return NO_GPU  # as torch would say after seconds of loading
    if find_spec(_NEEDS[backend]) is None:
        return f"the backend {backend} needs {missing(_NEEDS[backend], extra=backend)}"
    if backend != "cuda":
        return None
    from moac_runtime.backends.cuda.opening import device_obstacle

    return device_obstacle(targets)


def check_cpu(cpu: str | None, backend: str | None) -> str | None:
    """The backend that is asked for together with an instruction set: the cpu backend has them.

    Raises UsageError for an instruction set of another backend.
    """
    if cpu is None:
        return backend
    if backend not in (None, "cpu"):
        raise UsageError(
            f"--cpu is for the backend cpu, and --backend asks for {backend}; leave out one"
        )
    return "cpu"


def check_choice(kind: str, asked: str | None, choices: Collection[str]) -> None:
    if asked is not None and asked not in choices:
        raise UsageError(f"there is no {kind} {asked!r}; choose from {', '.join(choices)}")
