"""The Pareto front: plans of which none is better than another in every objective.

Epsilon-constraint (MoA, arXiv 2406.14909, section 4.3): one objective is minimised while the
others keep bounds, and the bounds sweep the range that the best plans span.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moac.planning.milp import TIE_BREAK, FrontPoint, Optimiser
from moac.planning.problem import Floats, Problem
from moac.planning.solver import STOPPED, SolverOptions

FRONT_GAP = 1e-2  # a hundredth of the loss: less than the tables can tell apart
EDGE = 1.5e-3  # where plans cost this much more than their bound, the bounds leave next to none
CELL_NODES = 500  # some bounds make a hard program, and any of their neighbours would do


def pareto_front(
    problem: Problem, *, points: int = 10, options: SolverOptions | None = None
) -> list[FrontPoint]:
    """About `points` plans, none dominated by another, by ascending loss in the first objective.

    Every objective's own best plan comes first; `2 * points` bounds are tried for the others. One
    objective has one best plan. `options.nodes` holds for each search, not for the front.
    """
    if points < 1:
        raise ValueError(f"points must be >= 1, got {points}")
    options = options or SolverOptions(gap=FRONT_GAP)
    optimiser = Optimiser(problem)
    found = [_extreme(optimiser, k, options) for k in range(len(problem.objectives))]
    for bounds in _sweep(np.array([point.losses for point in found]), 2 * points):
        front = _undominated(found)
        if len(front) >= points:
            return front
        point = optimiser.minimise(
            weights=_leading(optimiser, 0),
            bounds=bounds,
            options=replace(options, nodes=CELL_NODES),
            known=found,
            within=EDGE,
        )
        if point is not None and point.record.status != STOPPED:
            found.append(point)
    return _undominated(found)


def _extreme(optimiser: Optimiser, lead: int, options: SolverOptions) -> FrontPoint:
    """The best plan for objective `lead` (to within the gap), and of those the others' best."""
    choices = optimiser.choices
    count = len(choices.scale)
    free = np.full(count, np.inf)
    first = optimiser.minimise(weights=_leading(optimiser, lead), bounds=free, options=options)
    if first is None:
        raise RuntimeError("the solver found no plan, though the smallest one fits the budget")
    if count == 1:
        return first
    bounds = free.copy()
    given = options.gap * (first.losses[lead] - choices.ideal[lead])
    bounds[lead] = first.losses[lead] + given + 1e-5 * choices.scale[lead]
    others = np.where(np.arange(count) == lead, 0.0, 1 / choices.scale)
    return optimiser.minimise(weights=others, bounds=bounds, options=options) or first


def _leading(optimiser: Optimiser, lead: int) -> Floats:
    """Weights that minimise objective `lead` and break its ties by the others."""
    choices = optimiser.choices
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
        share = (0.5 + i * steps) % 1
        yield np.append(np.inf, low[1:] + share * (high - low)[1:])


def _undominated(points: list[FrontPoint]) -> list[FrontPoint]:
    """Of `points`, those that no other equals or beats in every objective (of equals, one)."""
    kept: list[FrontPoint] = []
    for point in sorted(points, key=lambda point: (point.losses, point.plan.rules)):
        if not any(_no_worse(other, point) for other in kept):
            kept.append(point)
    return kept


def _no_worse(one: FrontPoint, other: FrontPoint) -> bool:
    return all(a <= b for a, b in zip(one.losses, other.losses, strict=True))
