"""Choosing one elastic span rule per KV head: rule space, solver, Pareto front, baselines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moac.planning.capacities import largest_density
    from moac.planning.front import pareto_front
    from moac.planning.layerwise import layerwise_plan
    from moac.planning.milp import (
        FrontPoint,
        SolverRecord,
        solve_weighted,
    )
    from moac.planning.problem import HeadLayout, Objective, Problem, plan_losses, smallest_budget
    from moac.planning.rules import candidate_rules
    from moac.planning.solver import SolverOptions
    from moac.planning.uniform import matching_uniform, uniform_plan

__all__ = [
    "FrontPoint",
    "HeadLayout",
    "Objective",
    "Problem",
    "SolverOptions",
    "SolverRecord",
    "candidate_rules",
    "largest_density",
    "layerwise_plan",
    "matching_uniform",
    "pareto_front",
    "plan_losses",
    "smallest_budget",
    "solve_weighted",
    "uniform_plan",
]

_HOMES = {
    "FrontPoint": "milp",
    "HeadLayout": "problem",
    "Objective": "problem",
    "Problem": "problem",
    "SolverOptions": "solver",
    "SolverRecord": "milp",
    "candidate_rules": "rules",
    "largest_density": "capacities",
    "layerwise_plan": "layerwise",
    "matching_uniform": "uniform",
    "pareto_front": "front",
    "plan_losses": "problem",
    "smallest_budget": "problem",
    "solve_weighted": "milp",
    "uniform_plan": "uniform",
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for: rules and uniform plans are wanted where there is no solver.
    if name in _HOMES:
        return getattr(import_module(f"moac.planning.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
