"""Choosing one elastic span rule per KV head: rule space, solver, Pareto front, baselines."""

from moac.planning.front import pareto_front
from moac.planning.layerwise import layerwise_plan
from moac.planning.milp import (
    FrontPoint,
    SolverRecord,
    solve_minmax,
    solve_weighted,
)
from moac.planning.problem import Layout, Objective, Problem, plan_losses, smallest_budget
from moac.planning.rules import candidate_rules
from moac.planning.solver import SolverOptions
from moac.planning.uniform import largest_density_between, matching_uniform, uniform_plan

__all__ = [
    "FrontPoint",
    "Layout",
    "Objective",
    "Problem",
    "SolverOptions",
    "SolverRecord",
    "candidate_rules",
    "largest_density_between",
    "layerwise_plan",
    "matching_uniform",
    "pareto_front",
    "plan_losses",
    "smallest_budget",
    "solve_minmax",
    "solve_weighted",
    "uniform_plan",
]
