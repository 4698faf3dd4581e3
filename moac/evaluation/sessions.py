"""Sessions of a package's weights under any plan: its native CPU kernels, or torch's operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moac_runtime.backends.cpu.engine import obstacle
from moac_runtime.backends.cpu.library import runnable_sets
from moac_runtime.backends.cpu.opening import host_obstacle
from moac_runtime.backends.open import check_cpu, open_backend
from moac_runtime.backends.session import Session
from moac_runtime.errors import UsageError
from moac_runtime.host.cores import set_torch_threads
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.trust import TRUST_IT, UNTRUSTED

SESSION_BACKENDS = ("cpu", "torch")


@dataclass(frozen=True, slots=True)
class Sessions:
    """`open(plan)`: an empty session, in the package's dtype. `runs`: by what, for people.

    `note`: why the native kernels do not run, where nobody asked for torch.
    """

    backend: str
    runs: str
    open: Callable[[Plan], Session]
    note: str | None = None


def open_sessions(
    artifact: Artifact, backend: str | None = None, cpu: str | None = None
) -> Sessions:
    """Read a package's weights once. `backend`: "cpu" or "torch"; None is "cpu" where it runs.

    `cpu`: the instruction set of the native kernels, None is the best here. Raises UsageError for
    another backend, MoacError where the one asked for cannot run here.
    """
    check_backend(backend, cpu)
    backend = check_cpu(cpu, backend)
    set_torch_threads()
    shape = artifact.spec, artifact.dtype
    reason = host_obstacle(artifact.runs, None, model=shape) or obstacle(*shape)
    if not artifact.trusted and runnable_sets(artifact.targets):
        reason = f"{UNTRUSTED}; {TRUST_IT}"
    chosen = backend or ("cpu" if reason is None else "torch")
    opened = open_backend(artifact, chosen, cpu=cpu)
    if chosen == "cpu":
        return Sessions("cpu", f"the package's CPU kernels ({opened.kernels})", opened.session)
    note = reason if backend is None else None
    return Sessions("torch", "torch's own operators", opened.session, note)


def check_backend(backend: str | None, cpu: str | None = None) -> None:
    """Raise UsageError for a backend that no evaluation runs on, or one without `cpu`."""
    check_cpu(cpu, backend)
    if backend not in (None, *SESSION_BACKENDS):
        raise UsageError(
            f"there is no backend {backend!r} to evaluate on; choose from "
            f"{', '.join(SESSION_BACKENDS)}"
        )
