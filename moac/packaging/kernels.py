"""The cuda target of one compile: which kernels a package holds, and the list of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moac_kernels.build import BuildError, build_kernels
from moac_kernels.shape import KernelShape
from moac_kernels.tiles import ARCHS
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.host.cores import default_threads
from moac_runtime.host.extras import missing
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec

CUDA_TARGETS = ("cuda", *(f"cuda:{arch}" for arch in ARCHS))
_LISTED = ("name", "arch", "registers", "shared", "spills", "cubin", "ptx")


def cuda_archs(targets: Sequence[str]) -> tuple[int, ...]:
    """The compute capabilities that targets name, ascending; `cuda` alone names all of them."""
    if "cuda" in targets:
        return ARCHS
    return tuple(arch for arch in ARCHS if f"cuda:{arch}" in targets)


def require_kernels(spec: ModelSpec, plan: Plan | None, dtype: str) -> KernelShape:
    """The shape to build for. Raises UsageError where Triton is missing or no kernel serves it."""
    if find_spec("triton") is None:
        raise UsageError(f"the target cuda needs {missing('triton')} (on Linux)")
    try:
        return KernelShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            norm_eps=spec.norm_eps,
            activation=spec.activation,
            qk_norm=spec.qk_norm,
            windowed=any(window is not None for window in spec.windows),
            dtype=dtype,
            plan="" if plan is None else plan_digest(plan),
        )
    except ValueError as error:
        raise UsageError(
            f"no kernel serves this model ({error}); leave cuda out of --target"
        ) from error


def plan_digest(plan: Plan) -> str:
    """The first 16 hex digits of the SHA-256 of a plan's rules."""
    text = json.dumps(plan.to_json(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def emit_kernels(
    staging: Path, spec: ModelSpec, plan: Plan, dtype: str, targets: Sequence[str]
) -> None:
    """Write `kernels/` for the cuda targets, if there are any. Raises MoacError."""
    archs = cuda_archs(targets)
    if not archs:
        return
    try:
        shape = require_kernels(spec, plan, dtype)
        build_kernels(staging / "kernels", shape, archs, workers=default_threads())
    except BuildError as error:
        raise MoacError(f"{error}; leave cuda out of --target, and report this") from error


def packaged_kernels(artifact: Artifact) -> list[dict[str, Any]]:
    """`name`, `arch`, `registers`, `shared`, `spills`, `cubin` and `ptx` of every kernel built."""
    names = sorted(
        name
        for name in artifact.files
        if name.endswith(".json") and name.startswith(("kernels/sm_", "kernels/compute_"))
    )
    records = [json.loads((artifact.root / name).read_text(encoding="utf-8")) for name in names]
    return [{key: record[key] for key in _LISTED} for record in records]
