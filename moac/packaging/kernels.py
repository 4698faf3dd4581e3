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
from moac_runtime.package.activations import ACTIVATIONS
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
        return _shape(spec, plan, dtype)
    except ValueError as error:
        raise UsageError(
            f"no kernel serves this model ({error}); leave cuda out of --target"
        ) from error


def kernel_obstacle(spec: ModelSpec, dtype: str) -> str | None:
    """Why no kernel serves a model, None where they do."""
    try:
        _shape(spec, None, dtype)
    except ValueError as error:
        return str(error)
    return None


def _shape(spec: ModelSpec, plan: Plan | None, dtype: str) -> KernelShape:
    """Raises ValueError where no kernel serves the model."""
    if (lacking := _lacking(spec)) is not None:
        raise ValueError(f"the templates lack {lacking}")
    layer, norm = spec.kinds[0], spec.norm
    return KernelShape(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        hidden_size=spec.hidden_size,
        intermediate_size=layer.intermediate_size,
        norm_eps=norm.eps,
        activation=ACTIVATIONS[layer.activation].triton or layer.activation,
        windowed=any(window is not None for window in spec.windows),
        dtype=dtype,
        plan="" if plan is None else plan_digest(plan),
        qk_norm=layer.qk_norm,
        query_scale=layer.query_scale,
        score_cap=layer.logit_cap,
        sink_logits=layer.sink_logits,
        norm_plus_one=norm.plus_one,
        norm_centred=norm.centred,
        norm_bias=norm.bias,
        post_norm=layer.post_norm,
        plain_sums=any(layer.parallel or not layer.pre_norm for layer in spec.kinds),
        residual_scale=spec.residual_scale,
    )


_ALIKE = {
    "intermediate_size": "MLP widths",
    "activation": "activations",
    "qk_norm": "norms of queries and keys",
    "query_scale": "query scales",
    "logit_cap": "caps on scores",
    "sink_logits": "learned logits in the softmax",
    "post_norm": "norms after a sublayer",
}
"""What all layers of a model have alike, since one kernel serves them all."""


def _lacking(spec: ModelSpec) -> str | None:
    """The first option of the model that no template computes."""
    layers = spec.kinds
    lacking = {
        "mixtures of experts": any(layer.experts is not None for layer in layers),
        "MLPs with a limit, a slope or 1 + up": any(
            layer.mlp_limit is not None or layer.activation_slope != 1 or layer.up_plus_one
            for layer in layers
        ),
        "norms of several kinds": len({spec.norm, *(layer.norm for layer in layers)}) > 1,
    }
    for field, words in _ALIKE.items():
        lacking[f"layers of different {words}"] = len({getattr(x, field) for x in layers}) > 1
    return next((name for name, found in lacking.items() if found), None)


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
