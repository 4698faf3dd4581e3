"""The rule space: elastic span rules worth offering to every head.

MoA, arXiv 2406.14909, section 4.1, searches `alpha` in -2048..8192 by 1024 and `beta` in 0..1 by
1/8 for lengths 2k..8k. Here the same grid is scaled to the planned lengths.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from moac_runtime.package.span import DENSE, Rule, span_tokens

BETA_STEPS = 8
NUDGE = 1e-7  # over a million tokens less than an eighth, the least part of one in a share


def candidate_rules(
    lengths: Sequence[int],
    *,
    block: int,
    min_span: int,
    extrapolated: Sequence[int] = (),
    at_least: int = 64,
) -> tuple[Rule, ...]:
    """Rules that differ at some length of `lengths` or `extrapolated` (tokens), smallest first.

    `alpha` runs from minus the shortest to plus the longest planned length, in steps of half the
    shortest, halved until `at_least` rules differ or the step is one block. The minimum span at
    every length and the dense rule are always among them. Each jumps as late as it can (`latest`).
    """
    if not lengths:
        raise ValueError("lengths must name at least one planned length")
    every = (*lengths, *extrapolated)
    shortest, longest = min(lengths), max(lengths)
    step = max(shortest // 2 // block, 1) * block
    while True:
        grid = _grid(shortest, longest, step=step)
        rules = _distinct(grid, every, block=block, min_span=min_span)
        if len(rules) >= at_least or step == block:
            return rules
        step = max(step // 2 // block, 1) * block


def with_widths(rules: Sequence[Rule], widths: Sequence[int | None]) -> tuple[Rule, ...]:
    """Every rule in every width."""
    return tuple(replace(rule, bits=bits) for rule in rules for bits in widths)


def _grid(shortest: int, longest: int, *, step: int) -> list[Rule]:
    alphas = range(-(shortest // step) * step, longest + 1, step)
    return [Rule(alpha, k / BETA_STEPS) for alpha in alphas for k in range(BETA_STEPS + 1)]


def _distinct(
    grid: Sequence[Rule], lengths: Sequence[int], *, block: int, min_span: int
) -> tuple[Rule, ...]:
    """One rule per vector of spans: of several, the one with the least `alpha` in magnitude."""
    minimum = Rule(alpha=min_span, beta=0.0)
    chosen: dict[tuple[int, ...], Rule] = {}
    for rule in (DENSE, minimum, *sorted(grid, key=lambda rule: (abs(rule.alpha), rule))):
        spans = tuple(span_tokens(rule, n, block=block, min_span=min_span) for n in lengths)
        chosen.setdefault(spans, rule)
    return tuple(
        latest(chosen[spans], lengths, block=block, min_span=min_span) for spans in sorted(chosen)
    )


def latest(rule: Rule, lengths: Sequence[int], *, block: int, min_span: int) -> Rule:
    """The rule with the spans of `rule` at all of `lengths` and the least `alpha` within a block.

    Spans grow in jumps of a block. With `alpha` in blocks every head of a plan jumps right after
    a planned length, which all of them meet exactly, and the plan passes its budget there; with
    the least, at the length itself. A share of the length that is no whole number of tokens would
    jump some tokens before it, and so `beta` is larger by `NUDGE`. A rule that is dense at every
    length stays as it is.
    """
    if rule.beta == 0 or (rule.beta == 1 and rule.alpha >= 0):
        return rule

    def spans(alpha: int, beta: float) -> list[int]:
        other = Rule(alpha, beta)
        return [span_tokens(other, n, block=block, min_span=min_span) for n in lengths]

    wanted = spans(rule.alpha, rule.beta)

    def wide_enough(alpha: int, beta: float) -> bool:
        return all(a >= b for a, b in zip(spans(alpha, beta), wanted, strict=True))

    near = range(rule.alpha - block, rule.alpha + 1)
    more = min(round(rule.beta + NUDGE, 7), 1.0)
    for beta, widest in ((more, near[:-1]), (rule.beta, near)):
        place = bisect_left(widest, True, key=partial(wide_enough, beta=beta))
        if place < len(widest) and spans(widest[place], beta) == wanted:
            return Rule(widest[place], beta)
    return rule
