"""The Pareto front: plans of which none is better than another in every objective.

Epsilon-constraint (MoA, arXiv 2406.14909, section 4.3): one objective is minimised while the
others keep bounds, and the bounds sweep the range that the best plans span.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moac.planning.milp import TIE_BREAK, Choices, FrontPoint, minimise
from moac.planning.problem import Floats, Problem
from moac.planning.solver import SolverOptions

FRONT_GAP = 1e-2  # a hundredth of the loss: less than the tables can tell apart


def pareto_front(
    problem: Problem, *, points: int = 10, options: SolverOptions | None = None
) -> list[FrontPoint]:
    """About `points` plans, none dominated by another, by ascending loss in the first objective.

    Every objective's own best plan comes first; `2 * points` bounds are tried for the others. One
    objective has one best plan. `options.time_limit` holds for each solve, not for the front.
    """
    if points < 1:
        raise ValueError(f"points must be >= 1, got {points}")
    options = options or SolverOptions(gap=FRONT_GAP)
    choices = Choices.of(problem)
    found = [_extreme(choices, k, options) for k in range(len(problem.objectives))]
    for bounds in _sweep(np.array([point.losses for point in found]), 2 * points):
        front = _undominated(found)
        if len(front) >= points:
            return front
        weights = _leading(choices, 0)
        point = minimise(choices, weights=weights, bounds=bounds, options=options)
        found.extend([] if point is None else [point])
    return _undominated(found)


def _extreme(choices: Choices, lead: int, options: SolverOptions) -> FrontPoint:
    """The best plan for objective `lead` (to within the gap), and of those the others' best."""
    count = len(choices.scale)
    free = np.full(count, np.inf)
    first = minimise(choices, weights=_leading(choices, lead), bounds=free, options=options)
    if first is None:
        raise RuntimeError("the solver found no plan, though the smallest one fits the budget")
    if count == 1:
        return first
    bounds = free.copy()
    given = options.gap * (first.losses[lead] - choices.ideal[lead])
    bounds[lead] = first.losses[lead] + given + 1e-5 * choices.scale[lead]
    others = np.where(np.arange(count) == lead, 0.0, 1 / choices.scale)
    return minimise(choices, weights=others, bounds=bounds, options=options) or first


def _leading(choices: Choices, lead: int) -> Floats:
    """Weights that minimise objective `lead` and break its ties by the others."""
    count = len(choices.scale)
    share = np.where(np.arange(count) == lead, 1.0, TIE_BREAK / count)
    weights: Floats = share / choices.scale
    return weights


def _sweep(payoff: Floats, tries: int) -> Iterator[Floats]:
    """Bounds `[objectives]` spread evenly over the range of `payoff` `[extremes, objectives]`.

    A full grid has too many points in more than two dimensions, so an additive recurrence (the
    golden ratio's generalisation) fills the box evenly however many are taken.
    """
    low, high = payoff.min(axis=0), payoff.max(axis=0)
    dimensions = len(low) - 1
    if not (high > low)[1:].any():
        return
    ratio = 2.0
    for _ in range(50):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = ratio ** -np.arange(1.0, dimensions + 1)
    for i in range(1, tries + 1):
        share = np.append(np.inf, (0.5 + i * steps) % 1)
        yield np.where(np.isinf(share), np.inf, low + share * (high - low))


def _undominated(points: list[FrontPoint]) -> list[FrontPoint]:
    """Of `points`, those that no other equals or beats in every objective (of equals, one)."""
    kept: list[FrontPoint] = []
    for point in sorted(points, key=lambda point: (point.losses, point.plan.rules)):
        if not any(_no_worse(other, point) for other in kept):
            kept.append(point)
    return kept


def _no_worse(one: FrontPoint, other: FrontPoint) -> bool:
    return all(a <= b for a, b in zip(one.losses, other.losses, strict=True))
