"""A package whose code must not run here: by what of this host's own it runs instead.

Weights, plan, tokenizer and graph are data. Native kernels are the same for every model, so those
that this host builds from its own sources serve a stranger's package as well as its own would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moac_runtime.backends.cpu.engine import obstacle
from moac_runtime.backends.cpu.library import CPU_TARGETS, choose_set
from moac_runtime.errors import MoacError
from moac_runtime.package.artifact import Opening
from moac_runtime.package.trust import TRUST_IT, UNTRUSTED

Build = Callable[[str], Path]
"""The library of native kernels for an instruction set, built on this host from its own sources.

Raises MoacError where there can be none."""

_BUILDS_NONE = "the runtime alone builds no kernels, as moac run does"


@dataclass(frozen=True, slots=True)
class OwnKernels:
    """`library`: of this host's own, None where none serves; `reason`: why."""

    library: Path | None = None
    reason: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        """What they add to the targets of a package."""
        return () if self.library is None else (f"cpu:{self.library.stem}",)


def own_kernels(
    opening: Opening,
    backend: str | None,
    *,
    dtype: str | None = None,
    cpu: str | None = None,
    build: Build | None = None,
) -> OwnKernels:
    """This host's kernels for a package that is not trusted, where the backend cpu may run it.

    `backend`, `dtype`, `cpu`: what is asked for, as in `open.choose_backend`. `build`: None where
    nothing builds kernels. Raises MoacError where code of the package is asked for, or kernels
    that there cannot be.
    """
    if opening.trusted:
        return OwnKernels()
    kinds = {target.partition(":")[0] for target in opening.targets}
    asked = "cpu" if cpu is not None and backend is None else backend
    if asked == "cuda" and "cuda" in kinds:
        raise MoacError(f"{UNTRUSTED}, and the backend cuda is that; {TRUST_IT}")
    if asked not in (None, "cpu") or "cpu" not in kinds:
        return OwnKernels()
    found = _built(opening, dtype, cpu, build)
    if asked == "cpu" and found.library is None:
        raise MoacError(f"{UNTRUSTED}, and {found.reason}; {TRUST_IT}")
    return found


def told(opening: Opening, chosen: str, own: OwnKernels) -> str | None:
    """What the user is told of it; None where the package brings no code that could run here."""
    kinds = {target.partition(":")[0] for target in opening.targets}
    if opening.trusted or not kinds & {"cpu", "cuda"} or chosen == "onnx":
        return None
    if chosen == "cpu":
        return f"{UNTRUSTED}; kernels built here run it (--trust lets its own run)"
    reason = f", since {own.reason}" if own.reason else ""
    return f"{UNTRUSTED}; torch's own operators run it{reason} (--trust lets its kernels run)"


def _built(
    opening: Opening, dtype: str | None, cpu: str | None, build: Build | None
) -> OwnKernels:
    spec, own_dtype = opening.model
    if (unserved := obstacle(spec, dtype or own_dtype)) is not None:
        return OwnKernels(reason=f"no CPU kernel serves this model: {unserved}")
    if build is None:
        return OwnKernels(reason=_BUILDS_NONE)
    try:
        return OwnKernels(build(choose_set(CPU_TARGETS, cpu)))
    except MoacError as error:
        if error.exit_code == 2:  # a name of no instruction set
            raise
        return OwnKernels(reason=str(error))
