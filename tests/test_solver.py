"""The solver with few rules a layer: bounds that hold, searches that stop and say so."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest

from moac.planning import (
    HeadLayout,
    Objective,
    Problem,
    SolverOptions,
    candidate_rules,
    solve_weighted,
)
from moac.planning.choices import Choices, Criterion
from moac.planning.columns import Relaxation
from moac.planning.layers import num_sets, rule_sets, set_prices
from moac.planning.milp import Optimiser
from moac.planning.solver import solve

BLOCK, MIN_SPAN = 16, 32
LENGTHS = (256, 512)
BOTH = {"256": 1.0, "512": 1.0}


def make_problem(*, layers: int = 8, heads: int = 4, seed: int = 0, limit: int | None = 2):
    layout = HeadLayout(heads, 16, BLOCK, MIN_SPAN, (None,) * layers)
    rng = np.random.default_rng(seed)
    objectives = []
    for length in LENGTHS:
        spans = length // BLOCK + 1
        need = np.exp(rng.normal(size=(layers, heads, 1)))
        falls = rng.gamma(0.5, size=(layers, heads, spans)) * np.linspace(1, 0, spans) * need
        table = falls[..., ::-1].cumsum(axis=-1)[..., ::-1]
        objectives.append(Objective(str(length), length, table - table[..., -1:]))
    rules = candidate_rules(LENGTHS, block=BLOCK, min_span=MIN_SPAN, extrapolated=(1024,))
    return Problem(layout, rules, (*LENGTHS, 1024), tuple(objectives), 0.5, limit)


def assert_keeps(problem: Problem, plan) -> None:
    assert all(plan.density(n) <= problem.budget for n in problem.lengths)
    assert max(len(set(layer)) for layer in plan.rules) <= problem.rules_per_layer


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_set_prices_are_those_of_trying_each_set(limit):
    prices = np.random.default_rng(limit).normal(size=(2, 3, 5))
    sets = list(combinations_with_replacement(range(5), limit))
    expected = [[prices[layer][:, s].min(axis=1).sum() for s in sets] for layer in range(2)]
    assert set_prices(prices, limit) == pytest.approx(np.array(expected))
    assert rule_sets(5, limit).tolist() == [list(s) for s in sets]
    assert num_sets(5, limit) == len(sets)


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_of_the_relaxation_holds_and_is_tight(seed):
    problem = make_problem(seed=seed)
    choices = Choices.of(problem)
    criterion = Criterion.of(choices, np.ones(2), np.full(2, np.inf))
    relaxed = Relaxation(choices, 2).solve(criterion, gap=0.0)
    bound = criterion.floor + criterion.unit * relaxed.bound
    record = solve_weighted(problem, BOTH, options=SolverOptions(gap=1e-3)).record
    assert bound <= record.objective
    assert bound - criterion.floor > 0.95 * (record.objective - criterion.floor)


def test_a_hasty_bound_holds_too():
    choices = Choices.of(make_problem())
    criterion = Criterion.of(choices, np.ones(2), np.full(2, np.inf))
    relaxation = Relaxation(choices, 2)
    hasty = relaxation.solve(criterion, gap=0.5)
    assert 0 < hasty.bound < relaxation.solve(criterion, gap=0.0).bound


def test_few_rules_cost_no_less_than_many_and_the_gap_is_proven():
    free = solve_weighted(make_problem(limit=None), BOTH).record
    point = solve_weighted(make_problem(), BOTH, options=SolverOptions(gap=1e-3))
    assert_keeps(make_problem(), point.plan)
    assert point.record.status == "optimal"
    assert point.record.gap <= 1e-3
    assert point.record.objective >= free.bound


def test_the_rules_opened_in_one_large_program_lead_to_the_same_optimum(monkeypatch):
    problem = make_problem(layers=4, heads=3)
    options = SolverOptions(gap=1e-5)
    ours = solve_weighted(problem, BOTH, options=options).record
    monkeypatch.setattr("moac.planning.milp.MOST_SETS", 0)
    plain = solve_weighted(problem, BOTH, options=options).record
    assert ours.objective == pytest.approx(plain.objective, rel=1e-4)
    assert ours.bound <= plain.objective
    assert plain.bound <= ours.objective


@pytest.mark.parametrize("limit", [2, None])
def test_a_node_limit_returns_a_plan_with_its_gap_and_says_so(limit):
    problem = make_problem(limit=limit)
    best = solve_weighted(problem, BOTH, options=SolverOptions(gap=0.0)).record
    hasty = solve_weighted(problem, BOTH, options=SolverOptions(gap=0.0, nodes=0))
    assert hasty.record.status == "node limit"
    assert hasty.record.bound <= best.objective <= hasty.record.objective
    assert hasty.record.gap > best.gap
    assert all(hasty.plan.density(n) <= problem.budget for n in problem.lengths)


def test_a_search_cut_short_keeps_what_it_found(monkeypatch):
    problem = make_problem()
    first = []

    def once(lp, **options):
        """The first search runs; from then on there are no nodes left."""
        given = options["options"]
        options["options"] = replace(given, nodes=0) if first else given
        first.append(solve(lp, **options))
        return first[-1]

    monkeypatch.setattr("moac.planning.limited.solve", once)
    exact = SolverOptions(gap=0.0)
    point = solve_weighted(problem, BOTH, options=exact)
    assert point.record.status == "node limit"
    assert point.record.gap > 0
    assert_keeps(problem, point.plan)


@pytest.mark.parametrize("limit", [2, None])
def test_a_plan_at_hand_that_cannot_be_beaten_is_returned(limit):
    problem = make_problem(limit=limit)
    goal = {"weights": np.ones(2), "bounds": np.full(2, np.inf)}
    optimiser = Optimiser(problem)
    good = optimiser.minimise(**goal, options=SolverOptions(gap=1e-3))
    again = optimiser.minimise(**goal, options=SolverOptions(gap=3e-2), known=[good])
    assert again is good


def test_bounds_that_no_mixture_keeps_are_infeasible_without_a_search():
    optimiser = Optimiser(make_problem())
    bounds = np.array([np.inf, optimiser.choices.ideal[1] + 1e-6])
    goal = {"weights": np.ones(2), "bounds": bounds}
    assert optimiser.minimise(**goal, options=SolverOptions()) is None
