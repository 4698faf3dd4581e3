"""Planning: optimality against brute force, budgets kept by every plan, fronts, baselines."""

from __future__ import annotations

import itertools
from dataclasses import replace

import highspy
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moac.planning import (
    HeadLayout,
    Objective,
    Problem,
    SolverOptions,
    candidate_rules,
    matching_uniform,
    pareto_front,
    plan_losses,
    smallest_budget,
    solve_weighted,
    uniform_plan,
)
from moac.planning.beyond import spend_beyond
from moac_runtime.errors import BudgetError
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule, span_tokens

BLOCK, SINK, MIN_SPAN = 16, 16, 32
EXACT = SolverOptions(gap=0.0)
FOUR_RULES = (Rule(32, 0.0), Rule(0, 0.5), Rule(96, 0.0), DENSE)


def make_layout(layers: int = 2, heads: int = 2, windows: tuple[int | None, ...] | None = None):
    return HeadLayout(heads, SINK, BLOCK, MIN_SPAN, windows or (None,) * layers)


def make_objective(
    layout: HeadLayout, length: int, seed: int, name: str | None = None
) -> Objective:
    """Mostly falling losses, some negative, dense at 0; infinite below the minimum span."""
    rng = np.random.default_rng([seed, length])
    shape = (layout.num_layers, layout.num_kv_heads, -(-length // BLOCK) + 1)
    need = np.exp(rng.normal(size=(*shape[:2], 1)))
    table = need * np.linspace(1, 0, shape[2]) ** 2 + 0.2 * rng.normal(size=shape)
    table[..., -1] = 0.0
    table[..., : MIN_SPAN // BLOCK] = np.inf
    return Objective(name or str(length), length, table)


def make_problem(
    *,
    layers: int = 2,
    heads: int = 2,
    lengths: tuple[int, ...] = (128, 256),
    extrapolated: tuple[int, ...] = (512,),
    budget: float = 0.5,
    seed: int = 0,
    limit: int | None = None,
    rules: tuple[Rule, ...] | None = None,
    windows: tuple[int | None, ...] | None = None,
) -> Problem:
    layout = make_layout(layers, heads, windows)
    rules = rules or candidate_rules(
        lengths, block=BLOCK, min_span=MIN_SPAN, extrapolated=extrapolated
    )
    objectives = tuple(make_objective(layout, n, seed) for n in lengths)
    return Problem(layout, rules, (*lengths, *extrapolated), objectives, budget, limit)


def every_plan(problem: Problem) -> list[tuple[Plan, tuple[float, ...]]]:
    """All feasible plans with their losses, the slow and obvious way."""
    layout, found = problem.layout, []
    for flat in itertools.product(problem.rules, repeat=layout.num_heads):
        size = layout.num_kv_heads
        rows = [flat[i : i + size] for i in range(0, len(flat), size)]
        limit = problem.rules_per_layer
        if limit is not None and any(len(set(row)) > limit for row in rows):
            continue
        plan = layout.plan(rows)
        if all(plan.density(n) <= problem.budget for n in problem.capacities):
            found.append((plan, plan_losses(plan, problem.objectives)))
    return found


def assert_meets(problem: Problem, plan: Plan) -> None:
    for capacity in range(min(problem.lengths), max(*problem.lengths, problem.upto) + 1):
        assert plan.density(capacity) <= problem.budget
    if problem.rules_per_layer is not None:
        assert max(len(set(layer)) for layer in plan.rules) <= problem.rules_per_layer


def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


# --- rules


@pytest.mark.parametrize(
    ("lengths", "extrapolated"), [((512, 1024), (2048,)), ((2048, 4096, 8192), (16384,))]
)
def test_rules_are_many_distinct_and_hold_both_ends(lengths, extrapolated):
    rules = candidate_rules(lengths, block=64, min_span=128, extrapolated=extrapolated)
    every = (*lengths, *extrapolated)
    spans = [tuple(span_tokens(r, n, block=64, min_span=128) for n in every) for r in rules]
    assert 48 <= len(rules) <= 150
    assert len(set(spans)) == len(spans)
    assert DENSE in rules
    assert Rule(128, 0.0) in rules


def test_dense_stands_for_every_rule_that_is_dense_at_the_planned_lengths():
    rules = candidate_rules((256,), block=64, min_span=64)
    assert [r for r in rules if span_tokens(r, 256, block=64, min_span=64) == 256] == [DENSE]


# --- optimality


@pytest.mark.parametrize("limit", [None, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_weighted_and_bounded_solves_equal_brute_force(seed, limit):
    heads = 2 if limit != 2 else 3
    layers = 2 if limit != 2 else 1
    problem = make_problem(
        layers=layers, heads=heads, seed=seed, limit=limit, rules=FOUR_RULES, budget=0.55
    )
    plans = every_plan(problem)
    point = solve_weighted(problem, {"128": 1.0, "256": 0.5}, options=EXACT)
    best = min(a + 0.5 * b for _, (a, b) in plans)
    assert point.losses[0] + 0.5 * point.losses[1] == pytest.approx(best, abs=1e-6)
    assert point.record.objective == pytest.approx(best, abs=1e-6)
    assert point.record.status == "optimal"
    assert point.record.bound <= point.record.objective + 1e-9
    assert_meets(problem, point.plan)

    bound = float(np.median([b for _, (_, b) in plans]))
    bounded = solve_weighted(problem, {"128": 1.0}, bounds={"256": bound}, options=EXACT)
    assert bounded.losses[0] == pytest.approx(
        min(a for _, (a, b) in plans if b <= bound), abs=1e-6
    )
    assert bounded.losses[1] <= bound + 1e-6


def test_every_front_plan_is_on_the_true_front():
    problem = make_problem(rules=FOUR_RULES, seed=3)
    plans = every_plan(problem)
    for point in pareto_front(problem, options=EXACT):
        slightly_less = tuple(loss - 1e-6 for loss in point.losses)
        assert not any(dominates(losses, slightly_less) for _, losses in plans)


# --- every plan keeps the contract


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.26, 1 / 3, 0.5, 0.7, 1.0]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([None, (None, 64, None), (48, 100, 200)]),
    st.sampled_from([(128,), (128, 250)]),
)
def test_every_plan_of_the_front_is_feasible_and_none_beats_another(
    seed, budget, limit, windows, lengths
):
    assume(smallest_budget(make_layout(3, windows=windows), lengths)[0] <= budget)
    problem = make_problem(
        layers=3, seed=seed, budget=budget, limit=limit, windows=windows, lengths=lengths
    )
    front = pareto_front(problem, points=4)
    assert front
    for point in front:
        assert_meets(problem, point.plan)
        assert point.losses == plan_losses(point.plan, problem.objectives)
    for one, other in itertools.permutations(front, 2):
        assert not dominates(one.losses, other.losses)


def test_one_length_has_one_best_plan():
    problem = make_problem(lengths=(128,))
    (point,) = pareto_front(problem, options=EXACT)
    best = solve_weighted(problem, {"128": 2.0}, options=EXACT)
    assert point.losses == pytest.approx(best.losses)


def test_front_trades_the_objectives_against_each_other():
    front = pareto_front(make_problem(layers=4), points=6)
    assert len(front) == 6
    first, second = zip(*(point.losses for point in front), strict=True)
    assert list(first) == sorted(first)
    assert list(second) == sorted(second, reverse=True)


def test_objectives_may_share_a_length():
    layout = make_layout()
    pair = tuple(make_objective(layout, 128, seed, name) for seed, name in enumerate("ab"))
    problem = Problem(layout, FOUR_RULES, (128,), pair, 0.5)
    point = solve_weighted(problem, {"b": 1.0}, options=EXACT)
    assert point.losses[1] == pytest.approx(min(b for _, (_, b) in every_plan(problem)))


def test_same_input_gives_the_same_plans_and_records():
    fronts = [pareto_front(make_problem(layers=4, limit=2), points=5) for _ in range(2)]
    assert fronts[0] == fronts[1]
    assert fronts[0][0].record.seed == 0


def test_another_thread_count_in_the_process_changes_nothing():
    before = solve_weighted(make_problem(), {"128": 1.0})
    highspy.Highs.resetGlobalScheduler(True)
    other = highspy.Highs()
    other.setOptionValue("output_flag", False)
    other.setOptionValue("threads", 2)
    other.maximize(other.addBinary())
    assert solve_weighted(make_problem(), {"128": 1.0}) == before


def test_a_node_limit_returns_a_feasible_plan_with_an_honest_bound():
    problem = make_problem(layers=6, heads=4, lengths=(256, 512), extrapolated=())
    weights = {"256": 1.0, "512": 1.0}
    hasty = solve_weighted(problem, weights, options=SolverOptions(gap=0.0, nodes=0))
    best = solve_weighted(problem, weights, options=SolverOptions(gap=0.0))
    assert hasty.record.status == "node limit"
    assert_meets(problem, hasty.plan)
    assert hasty.record.bound <= best.record.objective <= hasty.record.objective
    assert hasty.record.gap > 0


def test_a_large_choice_is_solved_within_its_gap_from_the_core():
    problem = make_problem(layers=10, heads=3, lengths=(256, 512), extrapolated=(1024,))
    weights = {"256": 1.0, "512": 1.0}
    rough = solve_weighted(problem, weights, options=SolverOptions(gap=1e-2)).record
    exact = solve_weighted(problem, weights, options=SolverOptions(gap=1e-6)).record
    assert exact.gap <= 1e-6
    assert rough.gap <= 1e-2
    assert rough.bound <= exact.objective + 1e-6
    assert exact.objective <= rough.objective + 1e-6


# --- what cannot be done


def test_an_impossible_budget_is_told_with_the_smallest_possible():
    layout = HeadLayout(3, 64, 64, 128, (None,) * 2)
    with pytest.raises(BudgetError) as caught:
        uniform_plan(layout, budget=0.05, lengths=(2048, 1024))
    assert str(caught.value) == (
        "no plan fits budget 0.05 at length 1024: the smallest is 0.125 (every head at the "
        "minimum span of 128 tokens); ask for --budget 0.125 or more"
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(64, 2000), min_size=1, max_size=3), st.integers(17, 300))
def test_the_smallest_budget_works_when_asked_for(lengths, min_span):
    layout = HeadLayout(2, SINK, BLOCK, min_span, (None, 100))
    smallest, _ = smallest_budget(layout, lengths)
    plan = uniform_plan(layout, budget=smallest, lengths=lengths)
    assert all(plan.density(n) <= smallest for n in lengths)
    if smallest > 2e-4:
        with pytest.raises(BudgetError):
            uniform_plan(layout, budget=smallest - 2e-4, lengths=lengths)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, float("nan")])
def test_a_budget_outside_0_to_1_is_refused(budget):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        make_problem(budget=budget)


def test_bounds_that_no_plan_keeps_are_told():
    with pytest.raises(BudgetError, match="keeps 256 <= -1000"):
        solve_weighted(make_problem(), {"128": 1.0}, bounds={"256": -1000.0})


def test_tables_that_do_not_fit_are_refused():
    layout = make_layout()
    short = Objective("short", 128, np.zeros((2, 2, 4)))
    with pytest.raises(ValueError, match=r"short must have shape \(2, 2, 9\).*got \(2, 2, 4\)"):
        Problem(layout, FOUR_RULES, (128,), (short,), 0.5)
    holes = Objective("holes", 128, np.full((2, 2, 9), np.nan))
    problem = Problem(layout, FOUR_RULES, (128,), (holes,), 0.5)
    with pytest.raises(ValueError, match="holes is not finite at layer 0, KV head 0, span 32"):
        solve_weighted(problem, {"holes": 1.0})


def test_weights_must_name_objectives():
    with pytest.raises(ValueError, match="no objective is named 99; there are 128, 256"):
        solve_weighted(make_problem(), {"99": 1.0})
    with pytest.raises(ValueError, match="one of them above 0"):
        solve_weighted(make_problem(), {"128": 0.0})


# --- beyond the known lengths


BEYOND_RULES = (Rule(32, 0.0), Rule(0, 0.5), Rule(128, 0.0), Rule(256, 0.0), DENSE)


def spent_at(problem: Problem, plan: Plan, length: int) -> float:
    """What `plan` loses at a length where shares count as at the longest known length."""
    known = problem.objectives[-1]
    total = 0.0
    for layer, heads in enumerate(plan.spans(length)):
        for kv_head, head in enumerate(heads):
            least = int(np.isfinite(known.table).all(axis=(0, 1)).argmax())
            entry = max(round(head.size * known.length / length / BLOCK), least)
            total += known.table[layer, kv_head, entry]
    return total


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_left_beyond_is_spent_as_brute_force_would(seed, limit):
    problem = make_problem(seed=seed, rules=BEYOND_RULES, limit=limit, budget=0.6)
    found = solve_weighted(problem, {"128": 1.0, "256": 1.0}, options=EXACT).plan
    kept = (128, 192, 256)
    spent = spend_beyond(problem, found, kept, options=EXACT)
    assert_meets(problem, spent)
    alike = [
        plan
        for plan, _ in every_plan(problem)
        if all(plan.spans(n) == found.spans(n) for n in kept)
    ]
    assert spent in alike
    least = min(spent_at(problem, plan, 512) for plan in alike)
    assert spent_at(problem, spent, 512) == pytest.approx(least, abs=1e-6)


def test_a_head_that_keeps_everything_keeps_it_at_longer_lengths_too():
    problem = make_problem(rules=BEYOND_RULES, budget=0.6, extrapolated=(512,))
    keeps, few = Rule(256, 0.0), Rule(32, 0.0)
    plan = problem.layout.plan(((keeps, few), (few, few)))
    falling = tuple(
        replace(objective, table=np.broadcast_to(np.linspace(1, 0, width), (2, 2, width)).copy())
        for objective in problem.objectives
        for width in [objective.table.shape[-1]]
    )
    spent = spend_beyond(replace(problem, objectives=falling), plan, (128, 256), options=EXACT)
    assert spent == problem.layout.plan(((DENSE, few), (few, few)))


def test_nothing_is_spent_where_every_planned_length_is_known():
    problem = make_problem(rules=BEYOND_RULES, extrapolated=())
    plan = problem.layout.uniform(Rule(0, 0.5))
    assert spend_beyond(problem, plan, (128, 256), options=EXACT) is plan


# --- baselines


@pytest.mark.parametrize("budget", [0.25, 0.3, 0.5, 0.77, 1.0])
def test_uniform_plan_is_one_rule_as_dense_as_blocks_allow(budget):
    layout = make_layout(3)
    plan = uniform_plan(layout, budget=budget, lengths=(256, 512))
    assert len({rule for layer in plan.rules for rule in layer}) == 1
    for length in (256, 512):
        assert budget - BLOCK / length < plan.density(length) <= budget


def test_uniform_plan_at_a_round_budget_is_the_plain_ratio():
    assert uniform_plan(make_layout(), budget=0.5, lengths=(256, 512)).rules[0][0] == Rule(0, 0.5)


def test_matching_uniform_holds_as_much_to_half_a_block_a_head():
    problem = make_problem(layers=4, windows=(None, 100, None, None))
    plan = solve_weighted(problem, {"128": 1.0, "256": 1.0}).plan
    half = problem.layout.num_heads * BLOCK / 2
    for length in problem.lengths:
        uniform = matching_uniform(plan, lengths=(length,))
        assert len({rule for layer in uniform.rules for rule in layer}) == 1
        assert -half <= uniform.held_tokens(length) - plan.held_tokens(length) <= half


def test_matching_uniform_of_a_plan_just_under_its_budget_is_the_budgets():
    layout = make_layout()
    half = layout.uniform(Rule(0, 0.5))
    spans = [list(layer) for layer in half.rules]
    spans[0][0] = Rule(-BLOCK, 0.5)
    short = layout.plan(spans)
    assert short.density(512) < half.density(512)
    assert matching_uniform(short, lengths=(512,)).density(512) == half.density(512)
