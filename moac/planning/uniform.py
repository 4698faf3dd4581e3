"""Baselines: every head the same rule (attention sink and recent tokens)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from moac.planning.problem import HeadLayout, allowed_memory, check_budget
from moac_runtime.errors import BudgetError
from moac_runtime.package.kv_format import KV_BITS, KvShape
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule

BETA_STEPS = 1024
_WEIGHED_BY = (8, None, 4)


def uniform_plan(
    layout: HeadLayout, *, budget: float, lengths: Sequence[int], bits: int | None = None
) -> Plan:
    """Every head the same rule, at most `budget` at every length and as near as can be.

    `bits`: the width of all heads. A yardstick at those lengths, not a plan to run: all heads jump
    at once, so that between the lengths it passes the budget. Raises BudgetError where even the
    minimum span is too dense.
    """
    own = replace(layout, widths=(bits,))
    check_budget(own, budget, lengths)
    return _fullest(own, {n: allowed_memory(layout, budget, n) for n in lengths})


def reference_plan(layout: HeadLayout, *, budget: float, lengths: Sequence[int]) -> Plan:
    """The uniform plan that losses are weighed by: one of 8 bits, as people choose today.

    Where it would drop nothing, or is none of the layout's, the widest that fits, or the least.
    """
    found = None
    for bits in sorted(layout.widths, key=_WEIGHED_BY.index):
        try:
            plan = uniform_plan(layout, budget=budget, lengths=lengths, bits=bits)
        except BudgetError:
            continue
        if all(plan.density(n) < 1 for n in lengths):
            return plan
        found = found or plan
    return found or uniform_plan(layout, budget=budget, lengths=lengths, bits=layout.least.bits)


def matching_uniforms(plan: Plan, *, lengths: Sequence[int], kv: KvShape) -> list[Plan]:
    """Of every width the uniform plan that holds as many bytes as `plan`, if one is so small."""
    return list(_of_widths((None, *KV_BITS), plan, lengths, kv))


def uniform_baseline(plan: Plan, length: int, kv: KvShape) -> Plan:
    """Every head the same, of as much memory as `plan` at one length.

    Of a plan with widths that is as many bytes, in 8 bits or, where these would be more, in 4.
    """
    if not plan.rounds:
        return matching_uniform(plan, lengths=(length,))
    return next(_of_widths(KV_BITS, plan, (length,), kv))


def _of_widths(
    widths: Sequence[int | None], plan: Plan, lengths: Sequence[int], kv: KvShape
) -> Iterator[Plan]:
    for bits in widths:
        own = replace(HeadLayout.of(plan, kv), widths=(bits,))
        least = own.uniform(own.least)
        if all(own.held(least, n) <= own.held(plan, n) for n in lengths):
            yield _matching(plan, own, lengths)


def matching_uniform(plan: Plan, *, lengths: Sequence[int]) -> Plan:
    """The uniform plan that holds as much as `plan` at every length, to the nearest block a head.

    Equal spans move in blocks: rounded down, the baseline of a plan one block short of its budget
    would hold a block a head less than the budget gives it. Heads that hold all that the model's
    own window leaves them do not move.
    """
    return _matching(plan, HeadLayout.of(plan), lengths)


def _matching(plan: Plan, layout: HeadLayout, lengths: Sequence[int]) -> Plan:
    """In the memory that `layout` counts, of its one width."""
    held = {n: layout.held(plan, n) for n in lengths}
    below, (bits,) = _fullest(layout, held), layout.widths
    block = layout.block if layout.kv is None else layout.block * layout.kv.token_bytes(bits)
    half = {n: _moving(below, n) * block // 2 for n in lengths}
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
    """The uniform plan of the layout's one width that holds most with at most `allowed[length]`
    of memory at every length.

    For every `alpha` in blocks, spans grow with `beta`, so bisection finds the largest that fits.
    """
    lengths, (bits,) = tuple(allowed), layout.widths
    dense = [layout.dense_tokens(n) * layout.token_memory / layout.num_heads for n in lengths]

    def held(rule: Rule) -> list[int]:
        return [int(n) * layout.num_kv_heads for n in layout.memory([rule], lengths)[:, 0].sum(0)]

    def too_much(alpha: int, step: int) -> bool:
        found = held(Rule(alpha, step / BETA_STEPS, bits))
        return any(h > allowed[n] for n, h in zip(lengths, found, strict=True))

    def share(rule: Rule) -> float:
        return sum(h / n for n, h in zip(dense, held(rule), strict=True))

    fitting = [layout.least]
    least = -(min(lengths) // layout.block) * layout.block
    for alpha in range(least, max(lengths) + 1, layout.block):
        last = bisect_right(range(BETA_STEPS + 1), False, key=partial(too_much, alpha)) - 1
        fitting.extend([Rule(alpha, last / BETA_STEPS, bits)] if last >= 0 else [])
    return layout.uniform(max(fitting, key=lambda rule: (share(rule), -abs(rule.alpha))))
