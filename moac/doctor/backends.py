"""Which backends run here, and what a package would run with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moac.doctor.machine import own_sets
from moac_runtime.backends.cpu.library import CPU_TARGETS, runnable_sets
from moac_runtime.backends.open import RUNNABLE, backend_obstacle
from moac_runtime.package.artifact import Artifact, open_artifact
from moac_runtime.package.trust import TRUST_IT, UNTRUSTED


def backends() -> dict[str, str | None]:
    """Of each backend, best first, why it cannot run here; None where it can."""
    found = {name: obstacle(name, [name]) for name in RUNNABLE}
    if not runnable_sets(CPU_TARGETS):
        found["cpu"] = f"this processor runs none of {', '.join(own_sets())}"
    return found


def package_backends(path: Path) -> dict[str, Any]:
    """What the package at `path` runs with by default, and why not with each other backend.

    Names and sizes of its files are checked, not their hashes. Raises ArtifactError.
    """
    artifact = open_artifact(path, check="sizes")
    found = {name: _package_obstacle(name, artifact) for name in RUNNABLE}
    chosen = next((name for name, reason in found.items() if reason is None), None)
    return {
        "path": str(path),
        "targets": list(artifact.targets),
        "dtype": artifact.dtype,
        "trusted": artifact.trusted,
        "backend": chosen,
        "kernels": runnable_sets(_cpu_targets(artifact))[0] if chosen == "cpu" else None,
        "backends": found,
    }


def obstacle(name: str, targets: Sequence[str]) -> str | None:
    """Why a backend cannot run packages built for `targets` here; None where it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return backend_obstacle(name, targets)
        except Exception as error:  # a library that is broken raises anything when it loads
            reason = " ".join(str(error).split()) or type(error).__name__
            return f"what the backend {name} needs cannot be loaded: {reason}"


def _package_obstacle(name: str, artifact: Artifact) -> str | None:
    if name in _kinds(artifact.runs):
        return obstacle(name, artifact.runs)
    if name not in _kinds(artifact.targets):
        return f"the package is not built for it; compile it with --target {name} among others"
    if name == "cpu" and (reason := _unbuilt(artifact)) is None:
        return None
    because = f", and {reason}" if name == "cpu" else ""
    return f"{UNTRUSTED}{because}; {TRUST_IT}"


def _kinds(targets: Sequence[str]) -> set[str]:
    return {target.partition(":")[0] for target in targets}


def _cpu_targets(artifact: Artifact) -> Sequence[str]:
    """What of the backend cpu runs the package: its own kernels, or those that are built here."""
    return artifact.targets if artifact.trusted else CPU_TARGETS


def _unbuilt(artifact: Artifact) -> str | None:
    """Why a package whose code must not run gets no kernels that are built here."""
    from moac.packaging.cpu_kernels import cpu_obstacle  # which needs what doctor does without

    sets = runnable_sets(CPU_TARGETS)
    if not sets:
        return f"this processor runs none of {', '.join(own_sets())}"
    return cpu_obstacle(artifact.spec, artifact.dtype, sets[:1])
