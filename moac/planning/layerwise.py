"""The per-layer baseline: one rule for all heads of a layer, from the same tables and budget.

The step between a uniform plan and a plan per head (MoA, arXiv 2406.14909, table 3).
"""

from __future__ import annotations

from dataclasses import replace

from moac.planning.milp import solve_weighted
from moac.planning.problem import Floats, HeadLayout, Objective, Problem, plan_losses
from moac.planning.solver import SolverOptions
from moac.planning.uniform import reference_plan
from moac_runtime.package.plan import Plan


def layerwise_plan(problem: Problem, *, options: SolverOptions | None = None) -> Plan:
    """The plan with one rule a layer that loses least, summed over the objectives.

    Each objective counts in units of what the uniform plan at the same budget loses in it. The
    heads of a layer are planned as one head that loses what all of them do.
    """
    tied = replace(
        problem,
        layout=replace(problem.layout, num_kv_heads=1),
        objectives=tuple(_tied(objective) for objective in problem.objectives),
        rules_per_layer=None,
    )
    reference = reference_plan(tied.layout, budget=problem.budget, lengths=problem.lengths)
    units = plan_losses(reference, tied.objectives)
    weights = {
        objective.name: 1 / abs(unit) if unit else 1.0
        for objective, unit in zip(tied.objectives, units, strict=True)
    }
    found = solve_weighted(tied, weights, options=options).plan
    return _spread(found, problem.layout)


def _tied(objective: Objective) -> Objective:
    def together(table: Floats) -> Floats:
        summed: Floats = table.sum(axis=1, keepdims=True)
        return summed

    rounding = {bits: together(table) for bits, table in objective.rounding.items()}
    return replace(objective, table=together(objective.table), rounding=rounding)


def _spread(plan: Plan, layout: HeadLayout) -> Plan:
    return layout.plan([layer * layout.num_kv_heads for layer in plan.rules])
