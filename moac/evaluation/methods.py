"""The plans an evaluation compares: the package's own, and baselines on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moac.planning import HeadLayout
from moac.planning.uniform import uniform_baseline
from moac_runtime.errors import UsageError
from moac_runtime.package.artifact import Artifact, load_plan_record
from moac_runtime.package.plan import Plan, rule_from_json

OWN = "moac"

PlanAt = Callable[[int], Plan]
"""The plan a method runs at a length, in tokens."""


def method_plans(artifact: Artifact, against: Sequence[str]) -> dict[str, PlanAt]:
    """The package's own plan, "moac", and each baseline of `against`, by name.

    Raises UsageError for a baseline that there is not, or that the package holds no rules for.
    """
    made = {OWN: always(artifact.plan)}
    for name in against:
        if name not in BASELINES:
            raise UsageError(f"there is no baseline {name!r}; choose from {', '.join(BASELINES)}")
        made[name] = BASELINES[name](artifact)
    return made


def always(plan: Plan) -> PlanAt:
    """The same plan at every length."""
    return lambda length: plan


def is_plan_file(name: str) -> bool:
    """Whether something to compare with is a plan.json rather than a baseline's name."""
    return name.endswith(".json")


def _dense(artifact: Artifact) -> PlanAt:
    """Nothing is dropped."""
    return always(artifact.plan.undropping())


def _uniform(artifact: Artifact) -> PlanAt:
    """Every head the same sink and recent tokens, as many as the package's plan holds in all.

    Matched at each length by itself, to the nearest block a head. Of a plan with widths as many
    bytes, in 8 bits where these are enough, else in 4.
    """
    return lambda length: uniform_baseline(artifact.plan, length, artifact.kv)


def _layerwise(artifact: Artifact) -> PlanAt:
    """One rule a layer, planned by `moac compile` from the same profile within the same budget."""
    found = load_plan_record(artifact).get("layerwise")
    if found is None:
        raise UsageError(
            f"{artifact.root} was compiled without a layerwise baseline (plan.json has no "
            '"layerwise"), which needs the profile; compile it again, or leave layerwise out of '
            "--against"
        )
    layout = HeadLayout.of(artifact.plan)
    rules = [rule_from_json(rule) for rule in found]
    return always(layout.plan([[rule] * layout.num_kv_heads for rule in rules]))


BASELINES: Mapping[str, Callable[[Artifact], PlanAt]] = {
    "dense": _dense,
    "uniform": _uniform,
    "layerwise": _layerwise,
}
