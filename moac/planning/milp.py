"""The mixed-integer program: one rule per KV head, solved by HiGHS.

Multiple-choice knapsack: a binary `x[h, r]` per head and rule, one rule a head, tokens held within
the budget at every length (whole numbers, so exact), losses as objective or as bounds. With
`rules_per_layer`, a binary `y[l, r]` opens a rule for a layer.
MoA, arXiv 2406.14909, section 4.3.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import highspy
import numpy as np

from moac.planning.problem import Bools, Floats, Ints, Problem, plan_losses, undominated
from moac.planning.program import Program
from moac.planning.solver import SolverOptions, solve
from moac_runtime.errors import BudgetError
from moac_runtime.plan import Plan

CORE_CHOICES = 8
TIE_BREAK = 1e-3  # share of the other objectives in one that leads: no loss is given away for free


@dataclass(frozen=True, slots=True)
class SolverRecord:
    """How a plan was found.

    `objective`: the value minimised, `bound`: no plan has less, `gap`: their distance as a share
    of the objective's excess over the best rules without a budget. `status`: "optimal" (within
    the gap asked for) or "time limit". `seconds` is wall time and does not count in comparisons.
    """

    status: str
    objective: float
    bound: float
    gap: float
    seed: int
    seconds: float = field(compare=False)


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A plan, its predicted loss in every objective (in their order), and how it was found."""

    plan: Plan
    losses: tuple[float, ...]
    record: SolverRecord


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """The problem's columns: `layer`, `head` and `rule` of every choice that is left, `[C]`.

    `tokens` `[C, lengths]` whole numbers; `losses` `[C, objectives]`, from each head's own best
    choice upward, in units of `scale` `[objectives]`; `ideal` `[objectives]` the sum of those
    bests. Shifted and scaled so that solver tolerances mean the same for every table.
    """

    problem: Problem
    keep: Bools
    layer: Ints
    head: Ints
    rule: Ints
    tokens: Ints
    losses: Floats
    scale: Floats
    ideal: Floats

    @classmethod
    def of(cls, problem: Problem) -> Choices:
        """Every choice of `problem` that a best plan can contain."""
        sizes, losses = problem.sizes(), problem.losses()
        keep = undominated(sizes, losses, whole_layers=problem.limit is not None)
        best = np.where(keep[..., None], losses, np.inf).min(axis=2, keepdims=True)
        above = np.where(keep[..., None], losses - best, 0.0)
        spread = above.max(axis=2).mean(axis=(0, 1))
        scale = np.where(spread > 0, spread, 1.0)
        layer, head, rule = np.nonzero(keep)
        return cls(
            problem=problem,
            keep=keep,
            layer=layer,
            head=layer * problem.layout.num_kv_heads + head,
            rule=rule,
            tokens=sizes[layer, rule],
            losses=above[layer, head, rule] / scale,
            scale=scale,
            ideal=best.sum(axis=(0, 1, 2)),
        )

    def smallest(self) -> Ints:
        """The first plan there is: per head the choice that holds the fewest tokens, `[heads]`."""
        order = np.lexsort((self.rule, self.tokens.sum(axis=1), self.head))
        _, first = np.unique(self.head[order], return_index=True)
        return order[first]

    def plan(self, chosen: Ints) -> Plan:
        """The plan of `chosen` `[heads]`, one choice per head in order."""
        layout, rules = self.problem.layout, self.problem.rules
        grid = self.rule[chosen].reshape(layout.num_layers, layout.num_kv_heads)
        return layout.plan([[rules[rule] for rule in layer] for layer in grid])


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
    point = minimise(
        Choices.of(problem),
        weights=np.array([weights.get(name, 0.0) for name in names]),
        bounds=np.array([(bounds or {}).get(name, np.inf) for name in names]),
        options=options or SolverOptions(),
    )
    if point is None:
        limits = ", ".join(f"{name} <= {value:g}" for name, value in (bounds or {}).items())
        raise BudgetError(
            f"no plan found within budget {problem.budget:g} that keeps {limits}; "
            "raise the budget, the bounds or the time limit"
        )
    return point


def solve_minmax(
    problem: Problem, reference: Plan, *, options: SolverOptions | None = None
) -> FrontPoint:
    """The plan whose worst objective is least, each counted in losses of `reference`.

    Of plans with the same worst objective, one with low others: the record's objective is the
    worst ratio plus a thousandth of the mean ratio. A negative reference loss counts by its size.
    Raises ValueError where the reference loses nothing.
    """
    units = np.abs(plan_losses(reference, problem.objectives))
    for objective, unit in zip(problem.objectives, units, strict=True):
        if unit == 0:
            raise ValueError(f"the reference plan must have a loss in {objective.name}, got 0")
    point = minimise(
        Choices.of(problem),
        weights=TIE_BREAK / len(units) / units,
        bounds=np.full(len(units), np.inf),
        units=units,
        options=options or SolverOptions(),
    )
    if point is None:
        raise RuntimeError("the solver found no plan, though the smallest one fits the budget")
    return point


def minimise(
    choices: Choices,
    *,
    weights: Floats,
    bounds: Floats,
    options: SolverOptions,
    units: Floats | None = None,
) -> FrontPoint | None:
    """Least `weights . losses` (plus `max(losses / units)`) with `losses <= bounds`, or None.

    `weights`, `bounds` and `units`: `[objectives]`. None where no plan keeps the bounds, or where
    none was found in time. The budget alone always leaves a plan.
    """
    lp, floor, unit = _program(choices, weights, bounds, units)
    started = time.perf_counter()
    # A limit on rules leaves too few plans inside a core; elsewhere a handful a head is plenty.
    core = 0 if choices.problem.limit else CORE_CHOICES * choices.problem.layout.num_heads
    outcome = solve(lp, core=core, options=options)
    seconds = time.perf_counter() - started
    if outcome.values is not None:
        chosen = np.flatnonzero(outcome.values[: len(choices.rule)] > 0.5)
    elif outcome.status == "time limit" and not np.isfinite(bounds).any():
        chosen = choices.smallest()
    else:
        return None
    plan = choices.plan(chosen)
    _check(choices.problem, plan)
    losses = plan_losses(plan, choices.problem.objectives)
    objective = float(weights @ losses)
    if units is not None:
        objective += float((losses / units).max())
    least = min(max(floor, floor + unit * outcome.bound), objective)
    gap = 0.0 if least == objective else (objective - least) / (objective - floor)
    return FrontPoint(
        plan, losses, SolverRecord(outcome.status, objective, least, gap, options.seed, seconds)
    )


def _program(
    choices: Choices, weights: Floats, bounds: Floats, units: Floats | None
) -> tuple[highspy.HighsLp, float, float]:
    """The program, and the `floor` and `unit` that turn its objective back into losses.

    Columns: choices, then opened rules (`rules_per_layer`), then the worst ratio (`units`).
    """
    cost = weights * choices.scale
    floor = float(weights @ choices.ideal)
    ratios = np.zeros_like(cost) if units is None else choices.scale / units
    unit = float(max(cost.max(), ratios.max()))
    opened = _opened(choices)
    num_opened = 0 if opened is None else int(opened.max()) + 1
    num_binary = len(choices.rule) + num_opened
    tail = 0 if units is None else 1
    program = Program(
        cost=np.concatenate([choices.losses @ (cost / unit), np.zeros(num_opened), [1.0] * tail]),
        upper=np.concatenate([np.ones(num_binary), [np.inf] * tail]),
        integers=num_binary,
    )
    _add_heads(program, choices)
    _add_budget(program, choices)
    _add_bounds(program, choices, bounds)
    if opened is not None:
        _add_limit(program, choices, opened)
    if units is not None:
        best = float((choices.ideal / units).max())
        floor += best
        _add_worst(program, choices, ratios / unit, (best - choices.ideal / units) / unit)
    return program.build(), floor, unit


def _add_heads(program: Program, choices: Choices) -> None:
    """One choice a head."""
    ones = np.ones(choices.problem.layout.num_heads)
    program.add_rows(choices.head, np.arange(len(choices.head)), 1.0, lower=ones, upper=ones)


def _add_budget(program: Program, choices: Choices) -> None:
    """Tokens held within the budget at every length, in units of their greatest divisor."""
    for column, length in enumerate(choices.problem.lengths):
        tokens = choices.tokens[:, column]
        divisor = max(int(np.gcd.reduce(tokens)), 1)
        most = choices.problem.allowed_tokens(length) // divisor
        _add_one(program, tokens / divisor, upper=float(most))


def _add_bounds(program: Program, choices: Choices, bounds: Floats) -> None:
    """Losses at most `bounds`, each in its own scale."""
    for column in np.flatnonzero(np.isfinite(bounds)):
        above = (bounds[column] - choices.ideal[column]) / choices.scale[column]
        _add_one(program, choices.losses[:, column], upper=float(above))


def _add_one(program: Program, values: Floats, *, upper: float) -> None:
    columns = np.arange(len(values))
    lower = np.array([-np.inf])
    program.add_rows(np.zeros_like(columns), columns, values, lower=lower, upper=np.array([upper]))


def _opened(choices: Choices) -> Ints | None:
    """For every choice, the index of its layer's rule among those that may be opened, `[C]`."""
    if choices.problem.limit is None:
        return None
    pair = choices.layer * len(choices.problem.rules) + choices.rule
    index: Ints = np.unique(pair, return_inverse=True)[1].astype(np.int64)
    return index


def _add_limit(program: Program, choices: Choices, opened: Ints) -> None:
    """A choice needs its rule opened in its layer, and a layer opens at most so many rules."""
    column = np.arange(len(opened))
    rows, columns = np.tile(column, 2), np.concatenate([column, len(opened) + opened])
    values = np.repeat([1.0, -1.0], len(opened))
    free, zero = np.full(len(opened), -np.inf), np.zeros(len(opened))
    program.add_rows(rows, columns, values, lower=free, upper=zero)
    index, first = np.unique(opened, return_index=True)
    layers = choices.problem.layout.num_layers
    most = np.full(layers, float(choices.problem.limit or 0))
    program.add_rows(
        choices.layer[first],
        len(opened) + index,
        1.0,
        lower=np.full(layers, -np.inf),
        upper=most,
    )


def _add_worst(program: Program, choices: Choices, ratios: Floats, slack: Floats) -> None:
    """The last column is at least every objective's ratio."""
    count, last = len(choices.rule), len(program.cost) - 1
    columns = np.append(np.arange(count), last)
    for column, room in enumerate(slack):
        values = np.append(choices.losses[:, column] * ratios[column], -1.0)
        program.add_rows(
            np.zeros_like(columns),
            columns,
            values,
            lower=np.array([-np.inf]),
            upper=np.array([room]),
        )


def _check(problem: Problem, plan: Plan) -> None:
    """The solver works in floating point; a plan is believed only after counting tokens."""
    for length in problem.lengths:
        if plan.density(length) > problem.budget:
            raise RuntimeError(
                f"the solver returned a plan of density {plan.density(length)} at length "
                f"{length} for budget {problem.budget}"
            )
    limit = problem.rules_per_layer
    if limit is not None and max(len(set(layer)) for layer in plan.rules) > limit:
        raise RuntimeError(f"the solver returned a layer with more than {limit} rules")
