"""Which backend runs a package here, and opening it.

A backend's libraries load with it, while other threads check the package's files; a package run
by onnxruntime needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from moac_runtime.backends.cuda.host import NO_GPU, has_driver
from moac_runtime.engine.batch import OpenSession
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.host.cores import set_torch_threads
from moac_runtime.host.extras import missing
from moac_runtime.package.artifact import Artifact, Opening

BACKENDS = ("cpu", "cuda", "onnx", "torch")  # every name a package or a user may use


RUNNABLE = ("cuda", "cpu", "torch", "onnx")  # those this runtime has, best first

# What each backend but cpu loads; the extra of its name brings it.


_NEEDS = {"cuda": "torch", "torch": "torch", "onnx": "onnxruntime"}


@dataclass(frozen=True, slots=True)
class Ready:
    """A backend that has read a package's weights. `dtype`: of the cache, by name."""

    artifact: Artifact
    dtype: str
    open_session: Callable[[int, int], OpenSession]
    kernels: str | None = None


def _torch(opening: Opening, dtype: str | None, threads: int | None) -> Ready:
    import torch

    from moac_runtime.backends.torch.decoder import Decoder
    from moac_runtime.backends.torch.session import Session
    from moac_runtime.package.weights import load_weights

    set_torch_threads(threads)
    artifact = opening.result()
    precision = dtype or artifact.dtype
    torch_dtype = getattr(torch, precision)
    decoder = Decoder(artifact.spec, load_weights(artifact, torch_dtype), dtype=torch_dtype)

    def open_session(batch: int, capacity: int) -> Session:
        plan, order = artifact.plan, artifact.head_order
        return Session(decoder, plan, order, batch=batch, capacity=capacity)

    return Ready(artifact, precision, open_session)


def _onnx(opening: Opening, dtype: str | None, threads: int | None) -> Ready:
    from moac_runtime.backends.onnx.session import OnnxSession, open_graph

    artifact = opening.result()
    graph = open_graph(artifact, threads=threads)
    found = graph.layout.dtype
    if dtype not in (None, found):
        raise UsageError(
            f"the package's ONNX graph computes in {found}, not in {dtype}; leave out --dtype, or "
            f"compile the package with --onnx-dtype {dtype}"
        )

    def open_session(batch: int, capacity: int) -> OnnxSession:
        return OnnxSession(graph, batch=batch, capacity=capacity)

    return Ready(artifact, found, open_session)


def _cuda(opening: Opening, dtype: str | None, threads: int | None) -> Ready:
    from moac_runtime.backends.cuda.opening import open_cuda

    set_torch_threads(threads)
    artifact = opening.result()
    if dtype not in (None, artifact.dtype):
        raise UsageError(
            f"the package's kernels compute in {artifact.dtype}, not in {dtype}; leave out "
            "--dtype, or run with --backend torch"
        )
    model = open_cuda(artifact)
    return Ready(artifact, artifact.dtype, model.session, model.decoder.kernels.origin)


def _cpu(opening: Opening, dtype: str | None, threads: int | None) -> Ready:
    from moac_runtime.backends.cpu.opening import open_cpu

    model = open_cpu(opening.result(), dtype=dtype, threads=threads)
    return Ready(model.artifact, model.engine.dtype, model.session, model.instruction_set)


OPENERS = {"cpu": _cpu, "cuda": _cuda, "onnx": _onnx, "torch": _torch}


def choose_backend(asked: str | None, targets: Sequence[str], *, dtype: str | None = None) -> str:
    """The backend to run a package built for `targets` in `dtype`, None for its own.

    One asked for by name is never replaced by another. Raises UsageError or MoacError.
    """
    check_choice("backend", asked, BACKENDS)
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


def check_choice(kind: str, asked: str | None, choices: Collection[str]) -> None:
    if asked is not None and asked not in choices:
        raise UsageError(f"there is no {kind} {asked!r}; choose from {', '.join(choices)}")
