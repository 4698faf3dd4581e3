"""Known plans: measured beforehand, shipped with moac, found by what the model is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moac.goal import Budget
from moac.origin import told_model
from moac.pipeline.plan_file import (
    SHAPE,
    PlanFile,
    made_for,
    read_plan_file,
    read_untouched,
    refuse_beside_plan,
)
from moac.request import PLANNING, CompileRequest
from moac.store.sources import package_folder
from moac_runtime.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from moac.checkpoint import Checkpoint

KNOWN = "known"
"""What `--plan` says for the known plan of a model and a budget; `./known` is a file."""

PLANS = package_folder("moac") / "plans"
MOST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class KnownPlan:
    """The plan at `path`: the `model` it was made for, as `plan.json` tells it, and the budget."""

    path: Path
    model: dict[str, Any]
    budget: float

    @property
    def name(self) -> str:
        """The name that its file must have."""
        model = Path(self.model["source"]).name.lower().removesuffix(".gguf")
        readable = re.sub(r"[^a-z0-9.]+", "-", model).strip("-.")
        return f"{readable}-{self.budget}-{self.model['identity'][:8]}.json"

    def fits(self, checkpoint: Checkpoint) -> bool:
        """Whether it was made for this model, whose weights are read only if the shape is its."""
        same_shape = all(self.model[name] == getattr(checkpoint.spec, name) for name in SHAPE)
        return same_shape and self.model["identity"] == checkpoint.identity


def read_known(path: Path) -> KnownPlan:
    """The plan at `path`, which must be fit to be known. Raises ArtifactError where it is not.

    It is whole and untouched, names the model by its identity, was searched for under a budget,
    and takes at most `MOST_BYTES`.
    """
    data = read_untouched(path)
    fault = next(_faults(data, path.stat().st_size), None)
    if fault is not None:
        raise ArtifactError(f"{path} {fault}")
    return KnownPlan(path, data["model"], float(data["budget"]))


def _faults(data: dict[str, Any], size: int) -> Iterator[str]:
    """What keeps a plan from being known, first what later faults build on. `size`: in bytes."""
    model, asked, budget = data.get("model"), data.get("arguments"), data.get("budget")
    if size > MOST_BYTES:
        yield (
            f"takes {size} bytes, expected at most {MOST_BYTES}, since every install brings it: "
            "hand it out as a file"
        )
    if not isinstance(model, dict) or not {"source", "identity", *SHAPE} <= model.keys():
        yield (
            "does not name its model by an identity, as plans of older versions do not: write it "
            "again with `moac plan`"
        )
    if not isinstance(asked, dict) or "solver" not in data:
        yield (
            "does not tell how it was searched for, as edited plans do not: give one that "
            "`moac plan` wrote"
        )
    elif not isinstance(budget, (int, float)) or asked.get("budget") != budget:
        yield (
            "was not planned for a budget, by which known plans are found: write it with "
            "`moac plan --budget`"
        )


def known_plans() -> list[KnownPlan]:
    """Every plan that moac brings, by name. Raises ArtifactError where one is not as shipped."""
    return [_shipped(path) for path in sorted(PLANS.glob("*.json"))]


def _shipped(path: Path) -> KnownPlan:
    try:
        return read_known(path)
    except ArtifactError as error:
        raise ArtifactError(
            f"the known plan {path} is not as moac shipped it; install moac again"
        ) from error


def open_plan(plan: str | Path, checkpoint: Checkpoint, request: CompileRequest) -> PlanFile:
    """What `--plan` names, a file or the known plan of this model and budget.

    Raises UsageError for a plan of another model, a request that plans for itself and a plan that
    is not known; ArtifactError for a file without a plan.
    """
    if plan != KNOWN:
        return read_plan_file(Path(plan), checkpoint, request)
    packaging = replace(request, budget=None)
    refuse_beside_plan(packaging.planning_given())
    known = known_plans()
    found = next((p for p in known if p.budget == request.goal.share and p.fits(checkpoint)), None)
    if found is None:
        raise UsageError(_unknown(known, checkpoint, request.goal.share))
    return replace(read_plan_file(found.path, checkpoint, packaging), known=True)


def at_hand(
    checkpoint: Checkpoint, request: CompileRequest, out: str | Path, *, force: bool
) -> Iterator[str]:
    """What there is to say where a plan is known of what is about to be measured."""
    if not isinstance(request.goal, Budget):
        return
    try:
        known = known_plans()
    except ArtifactError as error:  # which stops nobody who measures
        yield str(error)
        return
    if any(p.budget == request.goal.share and p.fits(checkpoint) for p in known):
        yield (
            "a plan of this model and budget is known; to package it and measure nothing, run: "
            f"{_command(checkpoint, request, out, force=force)}"
        )


def _command(
    checkpoint: Checkpoint, request: CompileRequest, out: str | Path, *, force: bool
) -> str:
    """The command that packages the known plan as `request` would package one measured."""
    words = ["moac", "compile", checkpoint.source, "--plan", KNOWN]
    words += ["--budget", str(request.goal.share), *_packaging_words(request)]
    return shlex.join([*words, *(["--force"] if force else []), "-o", str(out)])


def _packaging_words(request: CompileRequest) -> Iterator[str]:
    """The options of a command line that ask for the same packaging."""
    for field in fields(request):
        value = getattr(request, field.name)
        if field.name not in PLANNING and value != field.default:
            yield f"--{field.name.replace('_', '-').replace('targets', 'target')}"
            yield ",".join(value) if isinstance(value, tuple) else str(value)


def _unknown(known: Sequence[KnownPlan], checkpoint: Checkpoint, budget: float) -> str:
    """Which plans there are, where none is of this model and budget."""
    measure = "leave out --plan to measure one"
    ours = [plan for plan in known if plan.fits(checkpoint)]
    if ours:
        return (
            f"no plan of {checkpoint.source} is known for a budget of {budget}, only for "
            f"{_listed(sorted(p.budget for p in ours))}; give one of these as --budget, or "
            f"{measure}"
        )
    told = told_model(made_for(checkpoint))
    if not known:
        return f"no plan of {told} is known, nor of any other model; {measure}"
    return f"no plan of {told} is known, only of {_listed(_models(known))}; {measure}"


def _models(known: Sequence[KnownPlan]) -> list[str]:
    """Each model with the budgets that plans are known for."""
    budgets: dict[str, list[float]] = {}
    for plan in known:
        budgets.setdefault(told_model(plan.model), []).append(plan.budget)
    return [f"{model} for {_listed(sorted(found))}" for model, found in sorted(budgets.items())]


def _listed(items: Sequence[object]) -> str:
    """`a, b and c`."""
    *others, last = map(str, items)
    return f"{', '.join(others)} and {last}" if others else last
