"""Sessions of a package's weights under any plan: its native CPU kernels, or torch's operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moac_runtime.backends.arrays import Array
from moac_runtime.backends.cpu.engine import obstacle
from moac_runtime.backends.cpu.opening import host_obstacle, open_cpu
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import Session
from moac_runtime.errors import UsageError
from moac_runtime.host.cores import set_torch_threads
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.weights import load_weights

SESSION_BACKENDS = ("cpu", "torch")


class EvalSession(Protocol):
    """What an evaluation asks of a session; arrays are of numpy or torch, float32."""

    @property
    def batch(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def lengths(self) -> list[int]: ...
    def extend(self, tokens: Sequence[Sequence[int]]) -> Array: ...
    def extend_all(self, tokens: Sequence[Sequence[int]]) -> Sequence[Array]: ...
    def extend_at(
        self, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> Sequence[Array]: ...
    def decode(self, tokens: Any) -> Array: ...
    def keep(self, rows: Sequence[int]) -> None: ...
    def kv_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Sessions:
    """`open(plan, batch, capacity)`, in the package's dtype. `runs`: by what, for people.

    `note`: why the native kernels do not run, where nobody asked for torch.
    """

    backend: str
    runs: str
    open: Callable[[Plan, int, int], EvalSession]
    note: str | None = None


def open_sessions(artifact: Artifact, backend: str | None = None) -> Sessions:
    """Read a package's weights once. `backend`: "cpu" or "torch"; None is "cpu" where it runs.

    Raises UsageError for another backend, MoacError where the one asked for cannot run here.
    """
    check_backend(backend)
    set_torch_threads()
    shape = artifact.spec, artifact.dtype
    reason = host_obstacle(artifact.targets, None, model=shape) or obstacle(*shape)
    if backend == "cpu" or (backend is None and reason is None):
        model = open_cpu(artifact)
        return Sessions(
            "cpu",
            f"the package's CPU kernels ({model.instruction_set})",
            lambda plan, batch, capacity: model.session(batch, capacity, plan=plan),
        )
    kind: torch.dtype = getattr(torch, artifact.dtype)
    decoder = Decoder(artifact.spec, load_weights(artifact, kind), dtype=kind)
    order = artifact.head_order
    return Sessions(
        "torch",
        "torch's own operators",
        lambda plan, batch, capacity: Session(
            decoder, plan, order, batch=batch, capacity=capacity
        ),
        note=reason if backend is None else None,
    )


def check_backend(backend: str | None) -> None:
    """Raise UsageError for a backend that no evaluation runs on."""
    if backend not in (None, *SESSION_BACKENDS):
        raise UsageError(
            f"there is no backend {backend!r} to evaluate on; choose from "
            f"{', '.join(SESSION_BACKENDS)}"
        )
