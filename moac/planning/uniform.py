"""Baselines: every head the same rule (attention sink and recent tokens)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial

from moac.planning.problem import HeadLayout, allowed_tokens, check_budget
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule

BETA_STEPS = 1024


def uniform_plan(layout: HeadLayout, *, budget: float, lengths: Sequence[int]) -> Plan:
    """Every head the same rule, density at most `budget` at every length and as near as can be.

    A yardstick at those lengths, not a plan to run: all heads jump at once, so that between the
    lengths it passes the budget. Raises BudgetError where even the minimum span is too dense.
    """
    check_budget(layout, budget, lengths)
    return _fullest(layout, {n: allowed_tokens(layout, budget, n) for n in lengths})


def matching_uniform(plan: Plan, *, lengths: Sequence[int]) -> Plan:
    """The uniform plan that holds as much as `plan` at every length, to the nearest block a head.

    Equal spans move in blocks: rounded down, the baseline of a plan one block short of its budget
    would hold a block a head less than the budget gives it. Heads that hold all that the model's
    own window leaves them do not move.
    """
    layout, held = HeadLayout.of(plan), {n: plan.held_tokens(n) for n in lengths}
    below = _fullest(layout, held)
    half = {n: _moving(below, n) * layout.block // 2 for n in lengths}
    return _fullest(layout, {n: held[n] + half[n] for n in lengths})


def _moving(plan: Plan, length: int) -> int:
    """How many heads of `plan` can hold more at `length` tokens."""
    dense = plan.undropping().spans(length)
    return sum(
        head.size < whole.size
        for layer, wholes in zip(plan.spans(length), dense, strict=True)
        for head, whole in zip(layer, wholes, strict=True)
    )


def _fullest(layout: HeadLayout, allowed: Mapping[int, int]) -> Plan:
    """The uniform plan that holds most tokens with at most `allowed[length]` at every length.

    For every `alpha` in blocks, spans grow with `beta`, so bisection finds the largest that fits.
    """
    lengths = tuple(allowed)
    dense = [layout.dense_tokens(n) / layout.num_heads for n in lengths]

    def held(rule: Rule) -> list[int]:
        return [int(n) * layout.num_kv_heads for n in layout.sizes([rule], lengths)[:, 0].sum(0)]

    def too_much(alpha: int, step: int) -> bool:
        tokens = held(Rule(alpha, step / BETA_STEPS))
        return any(h > allowed[n] for n, h in zip(lengths, tokens, strict=True))

    def share(rule: Rule) -> float:
        return sum(h / n for n, h in zip(dense, held(rule), strict=True))

    fitting = [Rule(alpha=layout.min_span, beta=0.0)]
    least = -(min(lengths) // layout.block) * layout.block
    for alpha in range(least, max(lengths) + 1, layout.block):
        last = bisect_right(range(BETA_STEPS + 1), False, key=partial(too_much, alpha)) - 1
        fitting.extend([Rule(alpha, last / BETA_STEPS)] if last >= 0 else [])
    return layout.uniform(max(fitting, key=lambda rule: (share(rule), -abs(rule.alpha))))
