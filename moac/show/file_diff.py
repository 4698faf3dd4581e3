"""Which files of two packages differ, and which of what is recorded explains it.

The same inputs, seed and kind of machine give the same bytes, so a difference has a cause: a fact
that a file follows from and that the two do not share. Where no such fact is recorded, that is
said, since it is a fault or damage. Imports no torch.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from moac.packaging.cpu_kernels import packaged_cpu_kernels
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.integrity import MANIFEST

_LIBRARIES = tuple(
    f"{name} version" for name in ("moac", "python", "torch", "transformers", "tokenizers")
)
_MODEL = ("source", "revision", "identity")
MACHINE = ("processor", "threads")
_MEASURED = ("device", "measured_in", *MACHINE, *_LIBRARIES)
PLANNING_ARGUMENTS = (
    *("argument max_kv_bytes", "argument batch", "argument length", "argument max_loss"),
    *("argument calibration", "argument effort", "argument samples", "argument plans"),
    *("argument seed", "budget", "lengths", "rules_per_layer"),
    "argument kv_bits",
)
_RULES = ("rules", "sink", "block", "min_span", "windows")
_PLAN = (
    *(*_MODEL, *_MEASURED, *_RULES, *PLANNING_ARGUMENTS, "plan", "highspy version"),
    *("extrapolated", "unseen", "capacity"),
)
_STORED = (
    *("identity", "dtype", "head order", "argument weights", "argument max_shard_size"),
    *("torch version", "safetensors version"),
)
_FEEDBACK = (*MACHINE, *_LIBRARIES, "argument seed")
_HOLD_WEIGHTS = ("weights/*", "model*.onnx*", "onnx*")
_GRAPH = ("argument onnx_dtype", "argument onnx_weights", *_STORED, *_RULES, "capacity")

FOLLOWS = {
    "plan.json": _PLAN,
    "weights/*": _STORED,
    "tokenizer/*": (*_MODEL, "transformers version", "tokenizers version"),
    "golden.safetensors": (*_PLAN, *_STORED),
    "model*.onnx*": _GRAPH,
    "onnx*": _GRAPH,
    "kernels/cpu/*": ("targets", "native kernels"),
    "kernels/*": ("targets", "dtype", "identity", "moac version", *_RULES),
    "moac_runtime/*": ("moac version",),
    "__main__.py": ("moac version",),
}
"""What the files of each pattern follow from, by names of facts; the first that fits counts."""


def package_facts(artifact: Artifact) -> dict[str, Any]:
    """What differs between packages without being told by itself: too long, or seen elsewhere."""
    return {
        "rules": artifact.plan.to_json()["rules"],
        "head order": [list(order) for order in artifact.head_order],
        "native kernels": packaged_cpu_kernels(artifact),
    }


def file_diff(
    a: Mapping[str, str], b: Mapping[str, str], differing: Sequence[str], *, rounded: bool
) -> dict[str, Any]:
    """How files by name, each with its SHA-256, differ. `differing`: facts that do.

    `rounded`: whether weights were rounded with feedback, so by passes of the model.
    `same`: how many are; `differ`, `only_a`, `only_b`: names; `because`: of every name among
    those, the differing facts that it follows from, none where nothing recorded tells why.
    """
    both = a.keys() & b.keys()
    found = {
        "differ": sorted(name for name in both if a[name] != b[name]),
        "only_a": sorted(a.keys() - b.keys()),
        "only_b": sorted(b.keys() - a.keys()),
    }
    names = [name for some in found.values() for name in some]
    return {
        "same": len(both) - len(found["differ"]),
        **found,
        "because": {name: _causes(name, differing, rounded) for name in names},
    }


def _causes(name: str, differing: Sequence[str], rounded: bool) -> list[str]:
    """The manifest and the report tell everything, and so follow from everything."""
    if name in (MANIFEST, "report.html"):
        return list(differing)
    known = next((f for p, f in FOLLOWS.items() if fnmatch.fnmatchcase(name, p)), ())
    if rounded and any(fnmatch.fnmatchcase(name, pattern) for pattern in _HOLD_WEIGHTS):
        known += _FEEDBACK
    return [fact for fact in differing if fact in known]
