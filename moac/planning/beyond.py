"""The budget beyond the profiled lengths, of which a plan made for those leaves some unspent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moac.planning.milp import Optimiser
from moac.planning.objectives import stretched
from moac.planning.problem import Floats, Objective, Problem, span_entries, table_shape
from moac.planning.solver import SolverOptions
from moac_runtime.package.plan import Plan


def spend_beyond(
    problem: Problem, plan: Plan, kept: Sequence[int], *, options: SolverOptions
) -> Plan:
    """Of all plans with widths and spans of `plan` at the lengths `kept`, the best at longer ones.

    Rules that agree where losses are known part beyond: a head that keeps all of 4096 tokens may
    keep all of 8192 or 4096 still. What spans lose at a longer length is taken to be what the same
    shares of the longest known length lose. Where the time of `options` ends without a result,
    `plan` stays as it is.
    """
    longest = max(problem.objectives, key=lambda objective: objective.length)
    farther = [n for n in problem.lengths if n > longest.length]
    if not farther:
        return plan
    beyond = [Objective(f"at {n}", n, _at(longest, n, problem)) for n in farther]
    other = [_others(plan, n, problem) for n in kept]
    found = Optimiser(replace(problem, objectives=(*beyond, *other))).minimise(
        weights=np.array([1.0] * len(beyond) + [0.0] * len(other)),
        bounds=np.array([np.inf] * len(beyond) + [0.0] * len(other)),
        options=options,
    )
    return plan if found is None else found.plan


def _at(longest: Objective, length: int, problem: Problem) -> Floats:
    """The losses of `longest` at a greater length, `[layers, kv_heads, spans]`."""
    spans = table_shape(problem.layout, length)[-1]
    return stretched(longest.table, spans, length / longest.length)


def _others(plan: Plan, length: int, problem: Problem) -> Objective:
    """1 for every span but that of `plan`, and for every width."""
    table: Floats = np.ones(table_shape(problem.layout, length))
    np.put_along_axis(table, span_entries(plan, length)[..., None], 0.0, axis=-1)
    widths = problem.layout.widths
    return Objective(
        f"other at {length}",
        length,
        table,
        {bits: _elsewhere(plan, bits, table) for bits in widths} if len(widths) > 1 else {},
    )


def _elsewhere(plan: Plan, bits: int | None, like: Floats) -> Floats:
    """1 for the heads whose width in `plan` is another one, `[layers, kv_heads, spans]`."""
    others = [[float(rule.bits != bits) for rule in layer] for layer in plan.rules]
    return np.broadcast_to(np.array(others)[..., None], like.shape)
