"""The best plan where layers may use few rules: bound it, then search where it can be.

The relaxation (`columns.py`) all but says which rules each layer uses, and what any other choice
would cost at least. So a search among the cheapest few sets of rules finds a good plan, and one
among all that could still be in a better plan proves how good it is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moac.planning.assembly import assemble
from moac.planning.choices import Choices, Criterion
from moac.planning.columns import Relaxation, Relaxed
from moac.planning.problem import Floats
from moac.planning.solver import (
    COARSE,
    STOPPED,
    WIDER,
    SolverOptions,
    SolverResult,
    is_close,
    solve,
)

_BOUND_SHARE = 0.05  # of the gap that may be lost by ending the relaxation early
_NODES = 200  # a search among few sets that takes more had better look at others
_INNER = 0.95  # of the gap, so that a search's own is within it after rounding


def solve_limited(
    choices: Choices,
    criterion: Criterion,
    relaxation: Relaxation,
    *,
    options: SolverOptions,
    known: float = np.inf,
    within: float = np.inf,
) -> SolverResult:
    """Minimise `criterion`; the values found are those of `choices`, `[C]`. See `solver.solve`.

    Where no plan is found at most the share `within` above the bound, it ends as "infeasible".
    """
    relaxed = relaxation.solve(criterion, gap=_BOUND_SHARE * options.gap)
    if relaxed.status != "optimal":
        return SolverResult(relaxed.status, None, np.inf, relaxed.bound)
    if is_close(known, relaxed.bound, options):
        return SolverResult("known", None, np.inf, relaxed.bound)
    return _Search(choices, criterion, relaxation, relaxed, options).run(within)


class _Search:
    """Searches that look ever farther from the bound, until one of them proves its plan."""

    def __init__(
        self,
        choices: Choices,
        criterion: Criterion,
        relaxation: Relaxation,
        relaxed: Relaxed,
        options: SolverOptions,
    ) -> None:
        self._choices, self._criterion, self._options = choices, criterion, options
        self._rule_sets, self._relaxed = relaxation.rule_sets, relaxed
        self._above = relaxed.sets - relaxed.sets.min(axis=1, keepdims=True)
        self._best = SolverResult("infeasible", None, np.inf, relaxed.bound)

    def run(self, within: float) -> SolverResult:
        """The best plan found, with what is proven of it."""
        heads = self._choices.problem.layout.num_heads
        unit = max(self._relaxed.bound, 1e-3 * heads)
        reach, farthest = 2 * COARSE * unit, self._farthest()
        extra = len(self._above)
        while True:
            cut = self._cut(extra)
            found = self._within(min(cut, reach), reach, coarse=cut < reach)
            self._take(found)
            if cut >= reach:
                self._prove(found, reach)
            if is_close(self._best.objective, self._best.bound, self._options):
                return replace(self._best, status="optimal")
            if cut >= reach and found.status == STOPPED:
                return replace(self._best, status=found.status)
            missed = self._best.objective - self._relaxed.bound
            if cut < reach:
                extra *= int(WIDER)
            elif reach >= min(missed, farthest) or (np.isinf(missed) and reach > within * unit):
                return replace(self._best, status=found.status)
            else:
                reach = min(missed, WIDER * reach)

    def _farthest(self) -> float:
        """From where on a search sees every choice."""
        paid = self._relaxed.choices
        dearest = np.where(np.isfinite(paid), paid, -np.inf).max(axis=2)
        return 2 * float((dearest - paid.min(axis=2)).sum())

    def _cut(self, extra: int) -> float:
        """What a set may cost above its layer's cheapest so that `extra` more are looked at."""
        above = self._above[np.isfinite(self._above)]
        most = len(self._above) + extra
        return float(np.partition(above, most)[most]) if most < len(above) else np.inf

    def _within(self, cut: float, reach: float, *, coarse: bool) -> SolverResult:
        """Search among sets up to `cut` above the cheapest, for plans up to `reach` above the
        bound.
        """
        keep = self._least(cut) <= reach + 1e-9
        heads = self._choices.problem.layout.num_kv_heads
        choices, bound = self._choices, self._best.bound
        kept = keep[choices.layer, choices.head % heads, choices.rule]
        gap = max(self._options.gap, COARSE) if coarse else self._options.gap
        nodes = self._options.nodes
        options = replace(
            self._options,
            gap=_INNER * gap,
            nodes=min(_NODES, nodes or _NODES) if coarse else nodes,
        )
        inside = choices.only(kept)
        found = solve(
            assemble(inside, self._criterion),
            options=options,
            target=bound * (1 + self._options.gap),
            proof=not coarse,
        )
        if found.values is None:
            return found
        values = np.zeros(len(choices.rule))
        values[kept] = found.values[: len(inside.rule)]
        return replace(found, values=values)

    def _least(self, cut: float) -> Floats:
        """By how much a plan with each choice, from sets up to `cut`, is above the bound at least.

        `[layers, heads, rules]`, infinite where no such set offers the choice.
        """
        least = np.full_like(self._relaxed.choices, np.inf)
        for layer, above in enumerate(self._above):
            sets = np.flatnonzero((above <= cut) | (self._relaxed.share[layer] > 1e-6))
            rules = self._rule_sets[sets]
            paid = self._relaxed.choices[layer][:, rules]
            more = above[sets][:, None] + paid - paid.min(axis=2, keepdims=True)
            heads = np.arange(len(paid))[:, None, None]
            np.minimum.at(least[layer], (heads, rules), more)
        return least

    def _take(self, found: SolverResult) -> None:
        if found.objective < self._best.objective:
            self._best = replace(found, bound=self._best.bound)

    def _prove(self, found: SolverResult, reach: float) -> None:
        """After a search among all that can be in a plan less than `reach` above the bound."""
        least = np.inf if found.status == "infeasible" else found.bound
        least = min(least, self._relaxed.bound + reach, self._best.objective)
        self._best = replace(self._best, bound=max(self._best.bound, least))
