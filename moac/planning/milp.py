"""Plans by mixed-integer programming: the problem, a criterion, and how the plan was found.

The program itself stands in `assembly.py`; `limited.py` solves it where layers may use few rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moac.planning.assembly import assemble
from moac.planning.capacities import over_budget
from moac.planning.choices import Choices, Criterion
from moac.planning.columns import Relaxation
from moac.planning.layers import num_sets
from moac.planning.limited import solve_limited
from moac.planning.problem import Floats, Ints, Problem, plan_losses
from moac.planning.solver import STOPPED, SolverOptions, SolverResult, solve
from moac_runtime.errors import BudgetError
from moac_runtime.package.plan import Plan

MOST_SETS = 25_000  # per layer, of the rules it may use; beyond, trying each takes too long
TIE_BREAK = 1e-3  # share of the other objectives in one that leads: no loss is given away for free


@dataclass(frozen=True, slots=True)
class SolverRecord:
    """How a plan was found.

    `objective`: the value minimised, `bound`: no plan has less, `gap`: their distance as a share
    of the objective's excess over the best rules without a budget. `status`: "optimal" (within
    the gap asked for) or "node limit".
    """

    status: str
    objective: float
    bound: float
    gap: float
    seed: int


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A plan, its predicted loss in every objective (in their order), and how it was found."""

    plan: Plan
    losses: tuple[float, ...]
    record: SolverRecord


def solve_weighted(
    problem: Problem,
    weights: Mapping[str, float],
    *,
    bounds: Mapping[str, float] | None = None,
    options: SolverOptions | None = None,
) -> FrontPoint:
    """The plan with the least weighted sum of losses, and no loss above its bound.

    Weights (not negative) and bounds are by objective name, in the tables' own units. Raises
    BudgetError where no plan keeps the bounds.
    """
    names = [objective.name for objective in problem.objectives]
    unknown = sorted({*weights, *(bounds or {})} - set(names))
    if unknown:
        raise ValueError(f"no objective is named {unknown[0]}; there are {', '.join(names)}")
    if min(weights.values(), default=0.0) < 0 or not any(weights.values()):
        raise ValueError(f"weights must be >= 0 and one of them above 0, got {dict(weights)}")
    point = Optimiser(problem).minimise(
        weights=np.array([weights.get(name, 0.0) for name in names]),
        bounds=np.array([(bounds or {}).get(name, np.inf) for name in names]),
        options=options or SolverOptions(),
    )
    if point is None:
        limits = ", ".join(f"{name} <= {value:g}" for name, value in (bounds or {}).items())
        raise BudgetError(
            f"no plan found within budget {problem.budget:g} that keeps {limits}; "
            "raise the budget, the bounds or the node limit"
        )
    return point


class Optimiser:
    """Finds plans of one problem; what one criterion teaches about layers helps with the next.

    The program counts memory at a few capacities. Where a plan passes the budget at others, they
    are counted too, for every criterion from then on, and the criterion is solved again.
    """

    def __init__(self, problem: Problem) -> None:
        self._set(problem)

    def _set(self, problem: Problem) -> None:
        self.choices = Choices.of(problem)
        limit = problem.limit
        few = limit is not None and num_sets(len(problem.rules), limit) <= MOST_SETS
        self._relaxation = Relaxation(self.choices, limit) if limit is not None and few else None

    def minimise(
        self,
        *,
        weights: Floats,
        bounds: Floats,
        options: SolverOptions,
        known: Sequence[FrontPoint] = (),
        within: float = np.inf,
    ) -> FrontPoint | None:
        """Least `weights . losses` with `losses <= bounds`, or None.

        `weights` and `bounds`: `[objectives]`. None where no plan keeps the bounds, or where none
        was found within the node limit, or (with few rules a layer) at most the share `within`
        above what the best plan is known to cost at least. The budget alone always leaves a plan.
        Where no plan can be better than one of `known` by more than the gap, that one is returned.
        """
        while True:
            found = self._minimise(weights, bounds, options, known, within)
            if found is None or found in known:
                return found
            problem, plan = self.choices.problem, found.plan
            _check(problem, plan)
            capacities, bounded = problem.capacities, problem.bounded
            kv = problem.layout.kv
            passed = over_budget(plan, problem.budget, capacities, between=bounded, kv=kv)
            if not passed:
                return found
            self._set(replace(problem, between=(*problem.between, *passed)))

    def _minimise(
        self,
        weights: Floats,
        bounds: Floats,
        options: SolverOptions,
        known: Sequence[FrontPoint],
        within: float,
    ) -> FrontPoint | None:
        """`minimise` with the budget at the bounded capacities alone."""
        criterion = Criterion.of(self.choices, weights, bounds)
        value, at_hand = self._best_known(criterion, known)
        outcome = self._solve(criterion, options, value, within)
        if outcome.status == "known":
            return at_hand
        chosen = self._chosen(outcome, bounds)
        if chosen is None:
            return None
        plan = self.choices.plan(chosen)
        losses = plan_losses(plan, self.choices.problem.objectives)
        record = _record(criterion, outcome, float(weights @ losses), options)
        return FrontPoint(plan, losses, record)

    def _best_known(
        self, criterion: Criterion, known: Sequence[FrontPoint]
    ) -> tuple[float, FrontPoint | None]:
        """The least value among plans that keep the bounds, and its plan."""
        best: tuple[float, FrontPoint | None] = (np.inf, None)
        for point in known:
            losses = (np.array(point.losses) - self.choices.ideal) / self.choices.scale
            if (losses <= criterion.upper).all() and criterion.value(losses) < best[0]:
                best = criterion.value(losses), point
        return best

    def _solve(
        self, criterion: Criterion, options: SolverOptions, known: float, within: float
    ) -> SolverResult:
        if self._relaxation is None:
            return solve(assemble(self.choices, criterion), options=options, known=known)
        return solve_limited(
            self.choices, criterion, self._relaxation, options=options, known=known, within=within
        )

    def _chosen(self, outcome: SolverResult, bounds: Floats) -> Ints | None:
        if outcome.values is not None:
            return np.flatnonzero(outcome.values[: len(self.choices.rule)] > 0.5)
        if outcome.status == STOPPED and not np.isfinite(bounds).any():
            return self.choices.smallest()
        return None


def _record(
    criterion: Criterion,
    outcome: SolverResult,
    objective: float,
    options: SolverOptions,
) -> SolverRecord:
    least = min(max(criterion.floor, criterion.floor + criterion.unit * outcome.bound), objective)
    gap = 0.0 if least == objective else (objective - least) / (objective - criterion.floor)
    return SolverRecord(outcome.status, objective, least, gap, options.seed)


def _check(problem: Problem, plan: Plan) -> None:
    """The solver works in floating point; a plan is believed only after counting its memory."""
    for length in problem.bounded:
        share = problem.layout.share(plan, length)
        if share > problem.budget:
            raise RuntimeError(
                f"the solver returned a plan of density {share} at length "
                f"{length} for budget {problem.budget}"
            )
    limit = problem.rules_per_layer
    if limit is not None and max(len(set(layer)) for layer in plan.rules) > limit:
        raise RuntimeError(f"the solver returned a layer with more than {limit} rules")
