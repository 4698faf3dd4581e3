"""The plan that a model is given, from a package or a plan.json: is it this model's?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moac.checkpoint.identity import safetensors_identity
from moac.checkpoint.tensors import check_tensors, expected_tensors
from moac.checkpoint.weights import open_weights
from moac.origin import told_model
from moac.pipeline.plan_file import SHAPE, read_plan_of_shape
from moac_runtime.errors import UsageError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Given:
    """A plan, and `most`, the largest capacity in tokens that it may be attached with."""

    plan: Plan
    most: int


def given_plan(path: Path, spec: ModelSpec, source: str) -> Given:
    """The plan of the package or the plan.json at `path`.

    `source`: the model's `_name_or_path`. Where it is a folder with safetensors, their contents
    must be those that the plan was made for; else nothing tells, and the shape alone is checked.
    Raises UsageError for a plan of another model, ArtifactError for a file without a plan.
    """
    given, made = _package(path, spec) if path.is_dir() else _file(path, spec)
    if given.plan.windows != spec.windows:
        raise UsageError(
            f"{path} was made for a model with sliding windows of other sizes than this one's; "
            "give a plan of this model"
        )
    folder = Path(source)
    if source and any(folder.glob("*.safetensors")):
        _check_identity(path, made, spec, folder)
    return given


def _package(path: Path, spec: ModelSpec) -> tuple[Given, Mapping[str, Any]]:
    artifact = open_artifact(path)
    for name in SHAPE:
        made, own = getattr(artifact.spec, name), getattr(spec, name)
        if made != own:
            raise UsageError(
                f"{path} was compiled from a model with {name} {made}, but this one has {own}; "
                "give a package of this model"
            )
    return Given(artifact.plan, min(artifact.capacity, spec.context)), artifact.provenance


def _file(path: Path, spec: ModelSpec) -> tuple[Given, Mapping[str, Any]]:
    plan, made = read_plan_of_shape(path, spec, "this model")
    return Given(plan, spec.context), made


def _check_identity(path: Path, made: Mapping[str, Any], spec: ModelSpec, folder: Path) -> None:
    weights = open_weights(folder)
    check_tensors(spec, weights.shapes, str(folder), config="this model's config")
    identity = safetensors_identity(spec, weights.files, tuple(expected_tensors(spec)))
    if made.get("identity") != identity:
        raise UsageError(
            f"{path} was made for {told_model(made)}, another model than {folder} (identity "
            f"{identity[:16]}), which this one was loaded from; give a plan of this model"
        )
