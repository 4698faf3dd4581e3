"""The budget at every capacity a session can open, counted one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

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
    largest_density,
    layerwise_plan,
    matching_uniform,
    pareto_front,
    plan_losses,
    smallest_budget,
    solve_weighted,
    uniform_plan,
)
from moac.planning.between import spend_between
from moac.planning.beyond import spend_beyond
from moac.planning.capacities import held_at, over_budget, sizes_at
from moac.planning.problem import allowed_at, allowed_memory
from moac.planning.rules import latest
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule, head_span, span_tokens

BLOCK, SINK, MIN_SPAN = 16, 16, 32
GOLDEN = Path(__file__).parent / "golden" / "smollm2_plan.json"
GOLDEN_LENGTHS = (1024, 2048, 4096, 8192)

BETAS = st.one_of(
    st.floats(0, 1), st.sampled_from([0.1, 1 / 3, 1e-17]), st.integers(0, 8).map(lambda k: k / 8)
)
RULES = st.builds(Rule, st.integers(-600, 600), BETAS)
WINDOWS = st.sampled_from([None, 1, 100, 256])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layers = draw(st.lists(st.tuples(RULES, RULES), min_size=1, max_size=3))
    windows = tuple(draw(WINDOWS) for _ in layers)
    return Plan(tuple(layers), sink=SINK, block=BLOCK, min_span=MIN_SPAN, windows=windows)


def make_problem(
    *,
    layers: int = 3,
    heads: int = 2,
    lengths: tuple[int, ...] = (128, 256),
    extrapolated: tuple[int, ...] = (512,),
    upto: int = 0,
    budget: float = 0.5,
    limit: int | None = None,
    windows: tuple[int | None, ...] | None = None,
    seed: int = 0,
) -> Problem:
    """Random losses that fall with the span, over the rules that a compile would offer."""
    layout = HeadLayout(heads, SINK, BLOCK, MIN_SPAN, windows or (None,) * layers)
    rules = candidate_rules(lengths, block=BLOCK, min_span=MIN_SPAN, extrapolated=extrapolated)
    objectives = []
    for length in lengths:
        rng = np.random.default_rng([seed, length])
        falls = rng.gamma(0.5, size=(layout.num_layers, heads, -(-length // BLOCK) + 1))
        table = falls[..., ::-1].cumsum(axis=-1)[..., ::-1]
        objectives.append(Objective(str(length), length, table - table[..., -1:]))
    planned = (*lengths, *extrapolated)
    return Problem(layout, rules, planned, tuple(objectives), budget, limit, upto)


def weights(problem: Problem) -> dict[str, float]:
    return {objective.name: 1.0 for objective in problem.objectives}


def assert_holds(plan: Plan, budget: float, shortest: int, longest: int) -> None:
    for capacity in range(shortest, longest + 1):
        assert plan.density(capacity) <= budget, capacity


def golden() -> Plan:
    return Plan.from_json(json.loads(GOLDEN.read_text()))


def late(plan: Plan, lengths: tuple[int, ...]) -> Plan:
    """`plan` with every rule at its latest."""

    def moved(rule: Rule) -> Rule:
        return latest(rule, lengths, block=plan.block, min_span=plan.min_span)

    return replace(plan, rules=tuple(tuple(map(moved, layer)) for layer in plan.rules))


# --- what a budget is a share of


def test_a_budget_is_a_share_of_what_the_model_holds() -> None:
    """One full layer and one with a window of 64: 576 tokens a head of 512."""
    problem = make_problem(layers=2, windows=(None, 64), lengths=(512,), extrapolated=())
    layout = problem.layout
    whole = layout.uniform(DENSE)
    assert whole.held_tokens(512) == whole.dense_tokens(512) == 2 * (512 + 64)
    assert whole.density(512) == 1
    assert layout.dense_at(np.array([32, 64, 512])).tolist() == [128, 256, 1152]
    assert allowed_memory(layout, 0.5, 512) == 576
    found = solve_weighted(problem, weights(problem)).plan
    assert 0.4 < found.density(512) <= 0.5
    assert max(head.size for head in found.spans(512)[0]) < 512
    for plan in (uniform_plan(layout, budget=0.5, lengths=(512,)), layerwise_plan(problem)):
        assert 0.4 < plan.density(512) <= 0.5
    assert matching_uniform(found, lengths=[512]).held_tokens(512) == pytest.approx(
        found.held_tokens(512), abs=layout.num_heads * BLOCK / 2
    )


def test_a_model_of_windows_alone_holds_all_that_it_does_by_itself() -> None:
    layout = HeadLayout(2, SINK, BLOCK, MIN_SPAN, (64, 64))
    assert layout.uniform(DENSE).density(512) == 1
    assert uniform_plan(layout, budget=0.5, lengths=(512,)).held_tokens(512) == 2 * 2 * 32


def test_gemma_3_270m_in_numbers() -> None:
    """15 layers with windows of 512 tokens and 3 without, one KV head."""
    windows = tuple(None if layer % 6 == 5 else 512 for layer in range(18))
    layout = HeadLayout(1, 64, 64, 128, windows)
    held = layout.dense_at(np.array([512, 1024, 8192])).tolist()
    assert held == [18 * 512, 15 * 512 + 3 * 1024, 15 * 512 + 3 * 8192] == [9216, 10752, 32256]
    assert allowed_memory(layout, 0.5, 8192) == 16128
    # the windows alone are no cut, and a span below them is
    assert layout.uniform(Rule(512, 0.0)).density(512) == 1
    assert layout.uniform(Rule(256, 0.0)).density(8192) == 18 * 256 / 32256


@given(plans(), st.integers(1, 5000))
def test_density_is_one_where_nothing_is_dropped(plan: Plan, capacity: int) -> None:
    sizes = [head.size for layer in plan.spans(capacity) for head in layer]
    limits = [min(capacity, window or capacity) for window in plan.windows for _ in range(2)]
    assert (plan.density(capacity) == 1) == (sizes == limits)
    assert plan.density(capacity) <= 1
    assert plan.undropping().density(capacity) == 1
    assert plan.undropping().held_tokens(capacity) == sum(limits)


# --- counting


@given(RULES, WINDOWS, st.integers(1, 5000), st.sampled_from([1, 16, 60, 64]))
def test_many_capacities_count_as_one_by_one(rule, window, first, block):
    every = np.arange(first, first + 300)
    sizes = sizes_at(rule, every, block=block, min_span=MIN_SPAN, window=window)
    expected = [
        head_span(rule, int(n), sink=SINK, block=block, min_span=MIN_SPAN, window=window).size
        for n in every
    ]
    assert sizes.tolist() == expected


@given(plans(), st.integers(1, 700), st.integers(0, 300), st.floats(0.05, 1))
def test_the_largest_density_and_where_a_budget_is_passed(plan, shortest, more, budget):
    every = range(shortest, shortest + more + 1)
    densities = [plan.density(n) for n in every]
    most = max(densities)
    assert largest_density(plan, every) == (most, every[densities.index(most)])
    assert held_at(plan, np.array(every)).tolist() == [plan.held_tokens(n) for n in every]
    passed = over_budget(plan, budget, every, between=(shortest, every[-1]))
    assert bool(passed) == (most > budget)
    assert all(plan.density(n) > budget for n in passed)


def test_one_capacity_of_each_gap_is_named_that_passes_by_most():
    plan = uniform_plan(make_problem().layout, budget=0.5, lengths=(256, 512))
    first, second = over_budget(plan, 0.5, range(256, 513), between=(256, 384, 512))
    assert first == 257
    assert 384 < second <= 512
    held = {n: plan.density(n) for n in range(385, 513)}
    assert held[second] == max(held.values())


@given(st.integers(1, 10**7), st.floats(0.001, 1), st.integers(1, 5000))
def test_the_most_tokens_that_are_allowed_are_the_last_within_the_budget(length, budget, heads):
    layout = HeadLayout(heads, SINK, BLOCK, MIN_SPAN, (None,))
    tokens = allowed_memory(layout, budget, length)
    assert tokens / (heads * length) <= budget < (tokens + 1) / (heads * length)
    assert allowed_at(layout, budget, np.array([1, length]))[1] == tokens


@pytest.mark.parametrize("capacities", [range(0), range(3), range(5, 5)])
def test_no_capacities_have_no_largest_density(capacities):
    with pytest.raises(ValueError, match="capacities must be some from 1 up"):
        largest_density(golden(), capacities)


def test_a_long_context_is_counted_to_its_end():
    far = HeadLayout.of(golden()).uniform(Rule(0, 0.5001))
    density, length = largest_density(far, range(1 << 19, 1 << 20))
    assert density == max(far.density(n) for n in range(length - 200, length + 200))
    assert density > 0.5001


# --- rules that jump late


@given(
    RULES,
    st.lists(st.integers(33, 3000), min_size=1, max_size=4),
    st.sampled_from([16, 64]),
)
def test_the_latest_rule_has_the_same_spans_where_they_count_and_never_wider_ones(
    rule, lengths, block
):
    def spans(other: Rule, at: list[int]) -> list[int]:
        return [span_tokens(other, n, block=block, min_span=MIN_SPAN) for n in at]

    found = latest(rule, lengths, block=block, min_span=MIN_SPAN)
    assert rule.beta <= found.beta <= min(rule.beta + 2e-7, 1)
    assert rule.alpha - block <= found.alpha <= rule.alpha
    assert spans(found, lengths) == spans(rule, lengths)
    every = list(range(1, 3200, 7))
    assert all(a <= b for a, b in zip(spans(found, every), spans(rule, every), strict=True))
    fixed = rule.beta == 0 or (rule.beta == 1 and rule.alpha >= 0)
    if fixed:
        assert found == rule
    elif found.alpha > rule.alpha - block:
        assert spans(replace(found, alpha=found.alpha - 1), lengths) != spans(rule, lengths)


def test_jumps_at_multiples_of_the_block_alone_pass_the_budget_and_late_ones_hardly():
    """A plan of rules in whole blocks, as they were planned once: 53.5 % right after a length."""
    plan, every = golden(), range(1024, 8193)
    density, length = largest_density(plan, every)
    assert (round(density, 4), length) == (0.5351, 1025)
    moved = late(plan, GOLDEN_LENGTHS)
    for n in GOLDEN_LENGTHS:
        assert moved.spans(n) == plan.spans(n)
    assert largest_density(moved, every)[0] < 0.505


def test_a_share_jumps_at_a_length_and_no_token_before_it():
    """Its half a token would bring 960 tokens and a half into the next block at 2047."""
    rule = latest(Rule(0, 0.5), (1024, 2048, 1 << 20), block=64, min_span=128)
    assert rule == Rule(-64, 0.5000001)
    at = {n: span_tokens(rule, n, block=64, min_span=128) for n in (2047, 2048, 2175, 2176)}
    assert at == {2047: 960, 2048: 1024, 2175: 1024, 2176: 1088}


def test_rules_that_are_offered_jump_late():
    lengths = (1024, 2048, 4096)
    rules = candidate_rules(lengths, block=64, min_span=128, extrapolated=(8192,))
    every = (*lengths, 8192)
    assert all(latest(rule, every, block=64, min_span=128) == rule for rule in rules)
    assert DENSE in rules


# --- every plan


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.26, 1 / 3, 0.5, 0.53, 0.8, 1.0]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([None, (None, 64, None), (48, 100, 200)]),
    st.sampled_from([(128,), (128, 250), (130, 200, 333)]),
    st.sampled_from([(), (512,), (64, 700)]),
    st.sampled_from([0, 200, 1200]),
)
def test_every_plan_holds_the_budget_at_every_capacity(
    seed, budget, limit, windows, lengths, extrapolated, upto
):
    layout = HeadLayout(2, SINK, BLOCK, MIN_SPAN, windows or (None,) * 3)
    if smallest_budget(layout, (*lengths, *extrapolated))[0] > budget:
        extrapolated = ()
    assume(smallest_budget(layout, lengths)[0] <= budget)
    problem = make_problem(
        lengths=lengths,
        extrapolated=extrapolated,
        upto=upto,
        budget=budget,
        limit=limit,
        windows=windows,
        seed=seed,
    )
    planned = (*lengths, *extrapolated)
    ends = min(planned), max(*planned, upto)
    point = solve_weighted(problem, weights(problem))
    beyond = spend_beyond(problem, point.plan, lengths, options=SolverOptions())
    spent = spend_between(problem, beyond)
    front = pareto_front(problem, points=2)
    for plan in (point.plan, beyond, spent, layerwise_plan(problem), *(p.plan for p in front)):
        assert_holds(plan, budget, *ends)
        assert limit is None or max(len(set(layer)) for layer in plan.rules) <= limit


def test_a_peak_between_the_lengths_is_counted_and_solved_again():
    """224 and a steep share fit at both lengths, and not at 224, where one of them is dense."""
    layout = HeadLayout(2, SINK, BLOCK, MIN_SPAN, (None,))
    flat, steep = Rule(224, 0.0), Rule(-31, 0.7)
    rules = (Rule(32, 0.0), Rule(64, 0.0), flat, steep)
    peaks = layout.plan(((flat, steep),))
    assert [peaks.held_tokens(n) for n in (128, 224, 512)] == [192, 352, 560]
    short, long = np.zeros((1, 2, 9)), np.zeros((1, 2, 33))
    short[0, 0, :8] = 9.0  # the first head needs all of the short text
    short[0, 1], long[0, 1] = np.linspace(1, 0, 9), np.linspace(1, 0, 33)
    objectives = (Objective("128", 128, short), Objective("512", 512, long))
    problem = Problem(layout, rules, (128, 512), objectives, 0.75)
    assert all(peaks.density(n) <= 0.75 for n in problem.lengths)
    point = solve_weighted(problem, weights(problem), options=SolverOptions(gap=0.0))
    assert point.plan == layout.plan(((flat, Rule(64, 0.0)),))


def test_a_plan_that_grows_past_the_budget_beyond_the_lengths_is_not_taken():
    """Of two rules with the same spans at all lengths, the wider one far away does not fit."""
    layout = HeadLayout(2, SINK, BLOCK, MIN_SPAN, (None,))
    table = np.broadcast_to(np.linspace(1, 0, 17), (1, 2, 17)).copy()
    rules = (Rule(32, 0.0), Rule(128, 0.0), Rule(-111, 0.9))
    problem = Problem(layout, rules, (256,), (Objective("256", 256, table),), 0.5)
    near = solve_weighted(problem, {"256": 1.0}, options=SolverOptions(gap=0.0))
    assert near.plan.held_tokens(256) == 256
    far = replace(problem, upto=4096)
    point = solve_weighted(far, {"256": 1.0}, options=SolverOptions(gap=0.0))
    assert_holds(point.plan, 0.5, 256, 4096)
    assert point.record.objective == near.record.objective


def test_late_rules_hold_the_budget_everywhere_at_the_price_of_the_lengths_alone(monkeypatch):
    late_rules = make_problem(layers=6, heads=4, lengths=(256, 512), extrapolated=(1024,))
    monkeypatch.setattr("moac.planning.rules.latest", lambda rule, *_, **__: rule)
    early = make_problem(layers=6, heads=4, lengths=(256, 512), extrapolated=(1024,)).rules
    assert all(rule.alpha % BLOCK == 0 for rule in early)
    both = weights(late_rules)

    def objective(problem: Problem) -> float:
        found = solve_weighted(problem, both, options=SolverOptions(gap=1e-4))
        return found.record.objective

    everywhere = objective(late_rules)
    at_blocks = objective(replace(late_rules, rules=early))
    monkeypatch.setattr("moac.planning.milp.over_budget", lambda *_, **__: ())
    at_lengths = objective(late_rules)
    assert objective(replace(late_rules, rules=early)) == pytest.approx(at_lengths, rel=1e-3)
    assert at_lengths * (1 - 1e-3) <= everywhere <= at_lengths * 1.005
    assert at_blocks > at_lengths * 1.02


# --- what is left between


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([None, 1]),
    st.sampled_from([None, (None, 64, None)]),
    st.sampled_from([0, 2000]),
)
def test_what_is_left_between_is_spent_where_no_loss_is_known(seed, limit, windows, upto):
    problem = make_problem(limit=limit, windows=windows, upto=upto, seed=seed)
    plan = solve_weighted(problem, weights(problem)).plan
    spent = spend_between(problem, plan)
    for n in problem.lengths:
        assert spent.spans(n) == plan.spans(n)
    assert plan_losses(spent, problem.objectives) == plan_losses(plan, problem.objectives)
    every = np.array(problem.capacities)
    more = held_at(spent, every) - held_at(plan, every)
    assert more.min() >= 0
    assert_holds(spent, problem.budget, problem.capacities[0], problem.capacities[-1])
    for before, after in zip(plan.rules, spent.rules, strict=True):
        for old, new in zip(before, after, strict=True):
            assert new.beta == old.beta
            assert 0 <= new.alpha - old.alpha < BLOCK
        if limit is not None:
            assert len(set(after)) <= len(set(before))


def test_most_of_what_late_jumps_leave_is_spent():
    """On a plan of a real profile, with jumps spread over all capacities."""
    plan = late(golden(), GOLDEN_LENGTHS)
    layout = HeadLayout.of(plan)
    tables = tuple(
        Objective(str(n), n, np.zeros((layout.num_layers, layout.num_kv_heads, n // 64 + 1)))
        for n in GOLDEN_LENGTHS[:3]
    )
    rules = tuple(dict.fromkeys((Rule(128, 0.0), *(r for row in plan.rules for r in row))))
    problem = Problem(layout, rules, GOLDEN_LENGTHS, tables, 0.51)
    spent = spend_between(problem, plan)
    every = np.arange(1024, 4097)
    share = layout.num_heads * every
    before, after = (float((held_at(p, every) / share).mean()) for p in (plan, spent))
    assert after > before + 0.005
    assert largest_density(spent, problem.capacities)[0] <= 0.51


def test_heads_that_lose_most_by_a_block_less_come_first():
    layout = HeadLayout(2, SINK, BLOCK, MIN_SPAN, (None,))
    table = np.zeros((1, 2, 17))
    table[0, 1] = np.linspace(1, 0, 17)
    rules = (Rule(32, 0.0), Rule(-15, 0.5))
    problem = Problem(layout, rules, (256,), (Objective("256", 256, table),), 0.5, upto=512)
    spent = spend_between(problem, layout.uniform(Rule(-15, 0.5)))
    first, second = spent.rules[0]
    assert first.alpha < second.alpha
