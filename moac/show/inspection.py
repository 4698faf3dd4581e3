"""What a package holds, as data: `moac inspect --json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moac.packaging.build_record import read_build
from moac.packaging.cpu_kernels import packaged_cpu_kernels
from moac.packaging.kernels import packaged_kernels
from moac.planning.capacities import largest_record
from moac_runtime.backends.cpu.opening import host_obstacle
from moac_runtime.package.artifact import Artifact, load_plan_record, open_artifact


def inspect_package(path: Path) -> dict[str, Any]:
    """Everything a user may ask of the package at `path`; raises ArtifactError."""
    return inspect_artifact(open_artifact(path))


def inspect_artifact(artifact: Artifact) -> dict[str, Any]:
    """The same of a package that is open already.

    `density`, `kv_bytes` and `spans` are by planned length (a string, as JSON keys are); `rules`
    `[layers][kv_heads]` are `[alpha, beta]` pairs and `spans` tokens, both in checkpoint order.
    A rule with a width is `[alpha, beta, bits]`; `widths` tells the bits of every head, None for
    the package's dtype, and `byte_share` what `kv_bytes` come to. `largest_density` and
    `largest_byte_share`: of all sessions from the shortest planned length to the capacity.
    `build`: when it was made, on what and in how long, None where `build.json` is not there.
    `cpu_note`: why the native CPU kernels do not run on this host, None where they do.
    """
    record = load_plan_record(artifact)
    lengths = planned_lengths(record)
    plan = artifact.plan
    sessions = range(lengths[0], max(lengths[-1], artifact.capacity) + 1)
    return {
        "path": str(artifact.root),
        "model": {
            **artifact.spec.to_json(),
            "num_layers": artifact.spec.num_layers,
            "windows": list(artifact.spec.windows),
        },
        "dtype": artifact.dtype,
        "weights": artifact.weights,
        "capacity": artifact.capacity,
        "targets": list(artifact.targets),
        "kernels": packaged_kernels(artifact),
        "cpu_kernels": packaged_cpu_kernels(artifact),
        "cpu_note": host_obstacle(artifact.targets, None, model=(artifact.spec, artifact.dtype)),
        "budget": record["budget"],
        "lengths": lengths,
        "sink": plan.sink,
        "block": plan.block,
        "min_span": plan.min_span,
        "rules": plan.to_json()["rules"],
        "density": {str(n): plan.density(n) for n in lengths},
        "largest_density": largest_record(plan, sessions),
        "byte_share": {str(n): plan.byte_share(n, artifact.kv) for n in lengths},
        "largest_byte_share": largest_record(plan, sessions, artifact.kv),
        "widths": [[rule.bits for rule in layer] for layer in plan.rules],
        "kv_format": artifact.kv_format,
        "kv_bytes": {str(n): kv_bytes(artifact, n) for n in lengths},
        "spans": {
            str(n): [[head.size for head in layer] for layer in plan.spans(n)] for n in lengths
        },
        "weight_bytes": sum(
            file.size for name, file in artifact.files.items() if name.startswith("weights/")
        ),
        "planning": {key: value for key, value in record.items() if key not in plan.to_json()},
        "provenance": dict(artifact.provenance),
        "verification": dict(artifact.verification),
        "build": read_build(artifact.root),
    }


def planned_lengths(record: dict[str, Any]) -> list[int]:
    """The lengths, in tokens, at which a plan promises its budget, ascending."""
    capped = record.get("kv_cap", {}).get("length")
    others = {n for n in (record["extrapolated"], capped) if n is not None}
    return sorted({*record["lengths"], *others})


def chosen_plan(record: Mapping[str, Any]) -> str:
    """The name that the package's plan bears among the measured ones; "" where none was."""
    front = record.get("front", ())
    return str(record.get("chosen", next((p["plan"] for p in front if p["chosen"]), "")))


def kv_bytes(artifact: Artifact, length: int) -> dict[str, int]:
    """Bytes of one sequence's keys and values at a capacity of `length`: held, and those that the
    model holds by itself."""
    return {
        "held": artifact.plan.held_bytes(length, artifact.kv),
        "dense": artifact.plan.dense_bytes(length, artifact.kv),
    }
