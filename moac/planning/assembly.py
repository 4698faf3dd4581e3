"""A criterion over choices as one mixed-integer program.

Multiple-choice knapsack: a binary `x[h, r]` per head and rule, one rule a head, memory held within
the budget where bounded (whole numbers, so exact), losses as objective or as bounds. Where a
layer has more rules to choose from than it may use, a binary `y[l, r]` opens a rule for it.
MoA, arXiv 2406.14909, section 4.3.
"""

from __future__ import annotations

import highspy
import numpy as np

from moac.planning.choices import Choices, Criterion
from moac.planning.problem import Bools, Floats, Ints
from moac.planning.program import Program


def assemble(choices: Choices, criterion: Criterion) -> highspy.HighsLp:
    """Columns: choices, then rules to open."""
    crowded = _crowded(choices)
    opened = _opened(choices, crowded)
    num_opened = int(opened.max(initial=-1)) + 1
    program = Program(np.concatenate([choices.losses @ criterion.cost, np.zeros(num_opened)]))
    _add_heads(program, choices)
    _add_budget(program, choices)
    for column in np.flatnonzero(np.isfinite(criterion.upper)):
        _add_one(program, choices.losses[:, column], upper=float(criterion.upper[column]))
    if num_opened:
        _add_limit(program, choices, np.flatnonzero(crowded), opened)
    return program.build()


def _add_heads(program: Program, choices: Choices) -> None:
    """One choice a head."""
    ones = np.ones(choices.problem.layout.num_heads)
    program.add_rows(choices.head, np.arange(len(choices.head)), 1.0, lower=ones, upper=ones)


def _add_budget(program: Program, choices: Choices) -> None:
    """Memory held within the budget where bounded, in units of its greatest divisor."""
    for column, length in enumerate(choices.problem.bounded):
        memory = choices.memory[:, column]
        divisor = max(int(np.gcd.reduce(memory)), 1)
        most = choices.problem.allowed_memory(length) // divisor
        _add_one(program, memory / divisor, upper=float(most))


def _add_one(program: Program, values: Floats, *, upper: float) -> None:
    columns = np.arange(len(values))
    lower = np.array([-np.inf])
    program.add_rows(np.zeros_like(columns), columns, values, lower=lower, upper=np.array([upper]))


def _crowded(choices: Choices) -> Bools:
    """Choices of layers with more rules to choose from than they may use, `[C]`."""
    problem = choices.problem
    present = np.zeros((problem.layout.num_layers, len(problem.rules)), dtype=np.bool_)
    present[choices.layer, choices.rule] = True
    limit = len(problem.rules) if problem.limit is None else problem.limit
    crowded: Bools = (present.sum(axis=1) > limit)[choices.layer]
    return crowded


def _opened(choices: Choices, crowded: Bools) -> Ints:
    """For every crowded choice, the index of its layer's rule among those to open."""
    pair = choices.layer[crowded] * len(choices.problem.rules) + choices.rule[crowded]
    index: Ints = np.unique(pair, return_inverse=True)[1].astype(np.int64)
    return index


def _add_limit(program: Program, choices: Choices, crowded: Ints, opened: Ints) -> None:
    """A choice needs its rule opened in its layer, and a layer opens at most so many rules."""
    row, first_opened = np.arange(len(opened)), len(choices.rule)
    program.add_rows(
        np.tile(row, 2),
        np.concatenate([crowded, first_opened + opened]),
        np.repeat([1.0, -1.0], len(opened)),
        lower=np.full(len(opened), -np.inf),
        upper=np.zeros(len(opened)),
    )
    index, first = np.unique(opened, return_index=True)
    _, layer = np.unique(choices.layer[crowded][first], return_inverse=True)
    most = np.full(int(layer.max()) + 1, float(choices.problem.limit or 0))
    lower = np.full(len(most), -np.inf)
    program.add_rows(layer, first_opened + index, 1.0, lower=lower, upper=most)
