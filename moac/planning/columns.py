"""A bound on the best plan where layers may use few rules, by column generation.

Dantzig and Wolfe (1960): a small linear program mixes whole layers found so far, keeps budgets and
bounds, and prices them; at these prices every layer looks for something better. The prices also
give the Lagrangian bound, which holds whatever they are (Geoffrion 1974). It is as tight as if
each layer's plans were replaced by all their mixtures, which the rows that open rules in a plain
program are far from.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from moac.planning.choices import Choices, Criterion
from moac.planning.layers import rule_sets, set_prices
from moac.planning.master import Columns, Master, Prices
from moac.planning.problem import Bools, Floats, Ints

_log = logging.getLogger(__name__)

_NOTHING = 1e-9  # of a criterion's value, which is of the order of one a head
_UNMET = 1e-7  # by which HiGHS lets a row be broken


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """`status`: "optimal" or "infeasible"; no plan's value is below `bound`.

    `choices` `[layers, heads, rules]` and `sets` `[layers, sets]`: what each pays at the prices
    that gave the bound, infinite where there is none. `share` `[layers, sets]`: how much of a
    layer the best mixture plans with each set of rules.
    """

    status: str
    bound: float
    choices: Floats
    sets: Floats
    share: Floats


class Relaxation:
    """The mixtures of whole layers of `choices`; what one criterion finds helps with the next."""

    def __init__(self, choices: Choices, limit: int) -> None:
        problem = choices.problem
        layout, num_rules = problem.layout, len(problem.rules)
        head = choices.head % layout.num_kv_heads
        shape = (layout.num_layers, layout.num_kv_heads, num_rules)
        self.limit = limit
        self.rule_sets = rule_sets(num_rules, limit)
        self._losses = np.zeros((*shape, choices.losses.shape[1]))
        self._losses[choices.layer, head, choices.rule] = choices.losses
        self._missing: Bools = np.ones(shape, dtype=np.bool_)
        self._missing[choices.layer, head, choices.rule] = False
        # Memory in shares of the budget, times heads: like the losses, of the order of one a head.
        allowed = np.array([problem.allowed_memory(n) for n in problem.bounded])
        self._budget = np.full(len(allowed), float(layout.num_heads))
        self._memory = problem.memory() * (self._budget / allowed)
        self._columns = self._smallest()

    def solve(self, criterion: Criterion, *, gap: float) -> Relaxed:
        """Mix until the bound is within `gap` of the best mixture."""
        master = Master(criterion, self._budget, self._columns, num_layers=len(self._losses))
        kept = self._descend(master, np.zeros_like(criterion.cost), gap=0.0)
        if kept.status != "optimal":
            return kept
        master.charge()
        return self._descend(master, criterion.cost, gap=gap)

    def _descend(self, master: Master, cost: Floats, *, gap: float) -> Relaxed:
        """Add columns until none helps. Before `charge`, until the bounds are kept."""
        least_sum, best = -np.inf, (np.zeros(0), np.zeros(0))
        while True:
            value, prices = master.solve()
            paid = self._paid(prices, cost)
            by_set = set_prices(paid, self.limit)
            least = by_set.min(axis=1)
            if least.sum() - prices.fixed > least_sum:
                least_sum, best = float(least.sum()) - prices.fixed, (paid, by_set)
            better = least < prices.layers - _NOTHING  # columns of negative reduced cost
            done = value - least_sum <= gap * value + _NOTHING or not better.any()
            if done or (not master.charged and least_sum > _UNMET):
                break
            found = self._columns_of(paid, by_set.argmin(axis=1), np.flatnonzero(better))
            self._columns = self._columns.and_also(found)
            master.add(found)
        status = "infeasible" if not master.charged and value > _UNMET else "optimal"
        bound = max(least_sum, 0.0) if master.charged else 0.0
        _log.debug("mixture of layers, %s: %.6g, bound %.6g", status, value, bound)
        return Relaxed(status, bound, *best, master.share(len(self.rule_sets)))

    def _paid(self, prices: Prices, cost: Floats) -> Floats:
        """What every choice pays, `[layers, heads, rules]`."""
        paid: Floats = self._losses @ (cost + prices.losses)
        paid += (self._memory @ prices.memory)[:, None, :]
        paid[self._missing] = np.inf
        return paid

    def _columns_of(self, paid: Floats, chosen: Ints, layers: Ints) -> Columns:
        """Each of `layers` with its set `chosen` `[all layers]`, every head at its cheapest."""
        sets = self.rule_sets[chosen[layers]]
        offered = np.take_along_axis(paid[layers], sets[:, None, :], axis=2)
        rule = np.take_along_axis(sets, offered.argmin(axis=2), axis=1)
        heads = np.arange(paid.shape[1])
        return Columns(
            layers,
            chosen[layers],
            self._memory[layers[:, None], rule].sum(axis=1),
            self._losses[layers[:, None], heads, rule].sum(axis=1),
        )

    def _smallest(self) -> Columns:
        """A first column for every layer, which together keep the budgets."""
        paid = np.repeat(self._memory.sum(axis=2)[:, None, :], self._missing.shape[1], axis=1)
        paid[self._missing] = np.inf
        cheapest = set_prices(paid, self.limit).argmin(axis=1)
        return self._columns_of(paid, cheapest, np.arange(len(paid)))
