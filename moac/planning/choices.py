"""A problem as flat columns, and a criterion over them, shifted and scaled for a solver."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moac.planning.problem import Bools, Floats, Ints, Problem, undominated
from moac_runtime.package.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """The problem's columns: `layer`, `head` and `rule` of every choice that is left, `[C]`.

    `memory` `[C, bounded]` whole numbers; `losses` `[C, objectives]`, from each head's own best
    choice upward, in units of `scale` `[objectives]`; `ideal` `[objectives]` the sum of those
    bests. Shifted and scaled so that solver tolerances mean the same for every table.
    """

    problem: Problem
    layer: Ints
    head: Ints
    rule: Ints
    memory: Ints
    losses: Floats
    scale: Floats
    ideal: Floats

    @classmethod
    def of(cls, problem: Problem) -> Choices:
        """Every choice of `problem` that a best plan can contain."""
        memory, losses = problem.memory(), problem.losses()
        keep = undominated(memory, losses, whole_layers=problem.limit is not None)
        best = np.where(keep[..., None], losses, np.inf).min(axis=2, keepdims=True)
        above = np.where(keep[..., None], losses - best, 0.0)
        spread = above.max(axis=2).mean(axis=(0, 1))
        scale = np.where(spread > 0, spread, 1.0)
        layer, head, rule = np.nonzero(keep)
        return cls(
            problem=problem,
            layer=layer,
            head=layer * problem.layout.num_kv_heads + head,
            rule=rule,
            memory=memory[layer, rule],
            losses=above[layer, head, rule] / scale,
            scale=scale,
            ideal=best.sum(axis=(0, 1, 2)),
        )

    def only(self, keep: Bools) -> Choices:
        """The choices where `keep` `[C]`, in the same units."""
        return replace(
            self,
            layer=self.layer[keep],
            head=self.head[keep],
            rule=self.rule[keep],
            memory=self.memory[keep],
            losses=self.losses[keep],
        )

    def smallest(self) -> Ints:
        """The first plan there is: per head the choice that takes the least memory, `[heads]`."""
        order = np.lexsort((self.rule, self.memory.sum(axis=1), self.head))
        _, first = np.unique(self.head[order], return_index=True)
        return order[first]

    def plan(self, chosen: Ints) -> Plan:
        """The plan of `chosen` `[heads]`, one choice per head in order."""
        layout, rules = self.problem.layout, self.problem.rules
        grid = self.rule[chosen].reshape(layout.num_layers, layout.num_kv_heads)
        return layout.plan([[rules[rule] for rule in layer] for layer in grid])


@dataclass(frozen=True, slots=True, eq=False)
class Criterion:
    """What to minimise over choices: `cost . losses`, which is never negative.

    Both `[objectives]`, losses as `Choices` scales them. `upper`: what they may sum to, infinite
    where free. In the tables' own units the value is `floor + unit * value`.
    """

    cost: Floats
    upper: Floats
    floor: float
    unit: float

    @classmethod
    def of(cls, choices: Choices, weights: Floats, bounds: Floats) -> Criterion:
        """Least `weights . losses` with `losses <= bounds`."""
        cost, ideal = weights * choices.scale, choices.ideal
        floor, unit = float(weights @ ideal), float(cost.max())
        return cls(cost / unit, (bounds - ideal) / choices.scale, floor, unit)

    def value(self, losses: Floats) -> float:
        """Of a plan whose choices' `losses` `[objectives]` are summed."""
        return float(self.cost @ losses)
