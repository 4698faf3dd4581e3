"""From a package to its native CPU kernels: whether this host runs them, and opening them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from moac_runtime.backends.cpu.engine import CpuEngine, obstacle
from moac_runtime.backends.cpu.library import (
    choose_set,
    library_name,
    open_library,
    packaged_library,
    products,
    runnable_sets,
)
from moac_runtime.backends.cpu.session import CpuSession
from moac_runtime.backends.cpu.weights import map_weights
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.host.extras import missing
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.trust import TRUST_IT, UNTRUSTED
from moac_runtime.package.weights import packed_names


def host_obstacle(
    targets: Sequence[str],
    dtype: str | None,
    *,
    features: Collection[str] | None = None,
    model: tuple[ModelSpec, str] | None = None,
) -> str | None:
    """Why a package's native kernels cannot run here and what to do, None where they can.

    `dtype`: asked for, None is the package's own. `features`: None is this processor's.
    `model`: the package's, with its dtype, so that a build that cannot be made is not advised.
    """
    built = [name for name in targets if name.partition(":")[0] == "cpu"]
    if not built:
        unserved = None if model is None else obstacle(*model)
        if unserved is not None:
            return f"no CPU kernel serves this model: {unserved}"
        return "the package has no native CPU kernels; compile it with --target torch,cpu"
    if not runnable_sets(targets, features):
        return (
            f"the package's CPU kernels are built for {', '.join(built)}, and this processor has "
            "none of these; compile it with --target torch,cpu, or run with --backend torch"
        )
    if dtype == "float16":
        return "the CPU kernels compute in bfloat16 and float32; choose one of these with --dtype"
    if find_spec("numpy") is None and find_spec("torch") is None:
        return f"the CPU kernels hand over arrays of {missing('numpy')}"
    return None


@dataclass(frozen=True, slots=True)
class CpuModel:
    """A model on the native kernels, a `Backend`. `kernels`: the instruction set in use.

    `plan`: the one that sessions run under where they are given no other. `products`: what most
    weights are multiplied in, by name.
    """

    engine: CpuEngine
    plan: Plan
    head_order: Sequence[Sequence[int]]
    kernels: str
    products: str

    @property
    def dtype(self) -> str:
        """Of weights and caches, by name."""
        return self.engine.dtype

    def session(self, plan: Plan | None = None) -> CpuSession:
        """A session without rows, under the model's own plan or another one."""
        return CpuSession(self.engine, plan or self.plan, self.head_order)


def open_cpu(
    artifact: Artifact,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    instruction_set: str | None = None,
    library: Path | None = None,
) -> CpuModel:
    """Open a package's kernels and map its weights. `threads`: None is every core at hand.

    `instruction_set`: None is what MOAC_CPU says, else the best this processor has. `library`:
    kernels in the place of the package's own, named by their instruction set. Raises UsageError
    for a dtype that no kernel computes in, ArtifactError, MoacError where no kernel fits this
    processor, or where the package's own are not trusted.
    """
    targets = artifact.targets if library is None else (f"cpu:{library.stem}",)
    reason = host_obstacle(targets, dtype, model=(artifact.spec, artifact.dtype))
    if reason is None and library is None and not artifact.trusted:
        reason = f"{UNTRUSTED}; {TRUST_IT}"
    if reason is not None:
        raise MoacError(reason)
    precision = dtype or artifact.dtype
    if (unserved := obstacle(artifact.spec, precision)) is not None:
        raise UsageError(
            f"the CPU kernels do not serve this ({unserved}); run with --backend torch"
        )
    chosen = choose_set(targets, instruction_set)
    if library is None:
        kernels = packaged_library(artifact, library_name(chosen))
    else:
        kernels = open_library(library)
    weights = map_weights(artifact, kernels, precision)
    engine = CpuEngine(
        kernels,
        artifact.spec,
        weights.addresses,
        dtype=precision,
        threads=threads,
        memory=weights.memory,
        packed=packed_names(artifact),
    )
    return CpuModel(
        engine,
        artifact.plan,
        artifact.head_order,
        chosen,
        products(chosen, precision, whole=artifact.weights != "full"),
    )
