"""The master program of the column generation: a mixture of whole layers, kept by HiGHS."""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np

from moac.planning.choices import Criterion
from moac.planning.highs import new_solver
from moac.planning.problem import Floats, Ints

_DROPPED = 1e-9  # what HiGHS itself would drop, with a warning


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Whole layers, `[n]`: `layer`, and the `rule_set` it was planned with.

    `memory` `[n, lengths]` and `losses` `[n, objectives]` are summed over the layer's heads.
    """

    layer: Ints
    rule_set: Ints
    memory: Floats
    losses: Floats

    def and_also(self, other: Columns) -> Columns:
        """Both, `other` last."""
        return Columns(
            np.concatenate([self.layer, other.layer]),
            np.concatenate([self.rule_set, other.rule_set]),
            np.concatenate([self.memory, other.memory]),
            np.concatenate([self.losses, other.losses]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """The dual prices of the rows: `memory` `[lengths]` and `losses` `[objectives]`, at least 0.

    `fixed` is to be subtracted once. `layers` `[layers]`: the least that a column of each layer
    pays at these prices.
    """

    memory: Floats
    losses: Floats
    fixed: float
    layers: Floats


class Master:
    """Rows: one mixture a layer, budgets, bounds.

    Until `charge` it only looks for a mixture that keeps the bounds: its value is by how much
    they are missed. From then on it minimises the criterion, and no bound may be missed.
    """

    def __init__(
        self, criterion: Criterion, budget: Floats, columns: Columns, *, num_layers: int
    ) -> None:
        self.charged = False
        self._criterion, self._budget, self._num_layers = criterion, budget, num_layers
        upper = np.concatenate([np.ones(num_layers), budget, criterion.upper])
        lower = np.concatenate([np.ones(num_layers), np.full(len(upper) - num_layers, -np.inf)])
        self._solver = new_solver()
        none = np.zeros(0, dtype=np.int32)
        self._solver.addRows(
            len(upper), lower, upper, 0, np.zeros(len(upper), dtype=np.int32), none, np.zeros(0)
        )
        first = num_layers + len(budget)
        for row in range(first, len(upper)):
            miss = np.array([row], dtype=np.int32)
            self._solver.addCol(1.0, 0.0, np.inf, 1, miss, np.array([-1.0]))
        self._misses = len(criterion.upper)
        self._columns = columns
        self._pass(columns)

    def add(self, columns: Columns) -> None:
        """Mix `columns` in, too."""
        self._columns = self._columns.and_also(columns)
        self._pass(columns)

    def charge(self) -> None:
        """From here on minimise the criterion; no bound may be missed."""
        self.charged = True
        missed = self._misses
        costs = np.concatenate([np.zeros(missed), self._cost(self._columns)])
        every = np.arange(len(costs), dtype=np.int32)
        self._solver.changeColsCost(len(costs), every, costs)
        self._solver.changeColsBounds(missed, every[:missed], np.zeros(missed), np.zeros(missed))

    def solve(self) -> tuple[float, Prices]:
        """The best mixture's value, and the prices under which it is the best."""
        self._solver.run()
        status = self._solver.getModelStatus()
        if status != highspy.HighsModelStatus.kOptimal:
            raise RuntimeError(f"the solver stopped with {status.name} on a mixture of layers")
        value = self._solver.getInfo().objective_function_value
        return value, self._prices(np.array(self._solver.getSolution().row_dual))

    def share(self, num_sets: int) -> Floats:
        """How much of each layer is planned with each set of rules, `[layers, sets]`."""
        found = np.array(self._solver.getSolution().col_value)[self._misses :]
        share = np.zeros((self._num_layers, num_sets))
        np.add.at(share, (self._columns.layer, self._columns.rule_set), found)
        return share

    def _cost(self, columns: Columns) -> Floats:
        cost: Floats = columns.losses @ self._criterion.cost
        return cost if self.charged else np.zeros_like(cost)

    def _pass(self, columns: Columns) -> None:
        count = len(columns.layer)
        values = np.hstack([np.ones((count, 1)), columns.memory, columns.losses])
        shared = np.arange(self._num_layers, self._num_layers + values.shape[1] - 1)
        rows = np.hstack([columns.layer[:, None], np.tile(shared, (count, 1))])
        used = np.abs(values) > _DROPPED
        starts = np.concatenate([[0], used.sum(axis=1).cumsum()[:-1]])
        self._solver.addCols(
            count,
            self._cost(columns),
            np.zeros(count),
            np.full(count, np.inf),
            int(used.sum()),
            starts.astype(np.int32),
            rows[used].astype(np.int32),
            values[used],
        )

    def _prices(self, duals: Floats) -> Prices:
        """Prices that bound: not negative, and no higher than a miss costs."""
        layers, charged = duals[: self._num_layers], np.maximum(-duals[self._num_layers :], 0.0)
        memory, losses = np.split(charged, [len(self._budget)])
        bounded = np.isfinite(self._criterion.upper)
        losses = np.where(bounded, losses if self.charged else np.minimum(losses, 1.0), 0.0)
        fixed = memory @ self._budget + losses[bounded] @ self._criterion.upper[bounded]
        return Prices(memory, losses, float(fixed), layers)
