"""Running HiGHS on a planning program: relax, then search near the relaxation, then farther.

The linear relaxation of a knapsack is nearly whole and costs milliseconds. Its reduced costs say
by how much a plan with some choice is above the bound at least, so that a search for plans near
the bound sees few columns, and proves that there is none where it finds none.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import highspy
import numpy as np

from moac.planning.highs import new_solver
from moac.planning.program import Floats

_log = logging.getLogger(__name__)

ABSOLUTE_GAP = 1e-9
COARSE = 1e-3  # twice this share above the bound is where the first search looks
STOPPED = "node limit"
"""The status of a search that ended before its proof."""
WIDER = 4.0  # times as far looks each further search


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverOptions:
    """How well a program is to be solved. No limit is one of time, which no two runs share.

    `gap`: the share of the loss (above the loss of the best rules without a budget) by which the
    result may miss the optimum; 0 asks for a proof. `nodes`: of the tree that one search may
    look at, None for all.
    """

    nodes: int | None = None
    gap: float = 1e-4
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class SolverResult:
    """`status`: "optimal", "node limit", "infeasible", or "known" (see `solve`).
    `values` `[columns]` or None; no solution has less than `bound`, in the program's own units.
    """

    status: str
    values: Floats | None
    objective: float
    bound: float


def is_close(objective: float, bound: float, options: SolverOptions) -> bool:
    """Whether a plan of that `objective` is as good as was asked for."""
    return np.isfinite(objective) and objective - bound <= options.gap * objective + ABSOLUTE_GAP


def solve(
    lp: highspy.HighsLp,
    *,
    options: SolverOptions,
    target: float = 0.0,
    known: float = np.inf,
    proof: bool = True,
) -> SolverResult:
    """Minimise `lp`, whose objective is never negative.

    Any solution of at most `target` will do; without `proof`, so will the first search's. `known`:
    the value of a solution at hand; where none can be better by more than the gap, the outcome is
    "known" and holds no values.
    """
    highspy.Highs.resetGlobalScheduler(True)  # it keeps the thread count of the first solve
    integrality, upper = lp.integrality_, np.array(lp.col_upper_)
    lp.integrality_ = []
    relaxed = _run(lp, options)
    status = relaxed.getModelStatus()
    lp.integrality_ = integrality
    if status != highspy.HighsModelStatus.kOptimal:
        return SolverResult(_word(status), None, np.inf, 0.0)
    bound = max(relaxed.getInfo().objective_function_value, 0.0)
    if is_close(known, bound, options):
        return SolverResult("known", None, np.inf, bound)
    target = max(target, bound * (1 + options.gap))
    reduced_costs = np.array(relaxed.getSolution().col_dual)
    best = SolverResult("infeasible", None, np.inf, bound)
    reach = first_reach(bound)
    while True:
        lp.col_upper_ = np.where(reduced_costs > reach, 0.0, upper)
        found = _search(lp, options, bound=bound, target=target)
        best = best_of(best, found, proven=bound + reach)
        missed = best.objective - bound
        last = reach >= min(missed, reduced_costs.max(initial=0.0)) or found.status == STOPPED
        found_one = best.values is not None and not proof
        if last or found_one or _enough(best, target, options):
            break
        reach = min(missed, WIDER * reach) + 1e-6
    proved = _enough(best, target, options)
    return replace(best, status="optimal" if proved else found.status)


def first_reach(bound: float) -> float:
    """How far above `bound` the first search looks."""
    return 2 * COARSE * bound + 1e-6


def best_of(best: SolverResult, found: SolverResult, *, proven: float) -> SolverResult:
    """The better solution; `found` searched all that can be in one of less than `proven`."""
    least = np.inf if found.status == "infeasible" else found.bound
    better = found if found.objective < best.objective else best
    least = min(least, proven, better.objective)
    return replace(better, bound=max(best.bound, least if np.isfinite(least) else best.bound))


def _enough(best: SolverResult, target: float, options: SolverOptions) -> bool:
    return is_close(best.objective, best.bound, options) or best.objective <= target


def _search(
    lp: highspy.HighsLp, options: SolverOptions, *, bound: float, target: float
) -> SolverResult:
    """Branch and bound until the gap is closed, or a solution of at most `target` is found."""
    solver = _run(lp, options, target=target)
    if solver.getModelStatus() == highspy.HighsModelStatus.kSolveError:
        # HiGHS 1.15 can presolve a small program to a point that breaks a row, and notices.
        solver = _run(lp, options, target=target, presolve="off")
    status, info = solver.getModelStatus(), solver.getInfo()
    word = _word(status)
    _log.debug(
        "%s: objective %.6g, bound %.6g, target %.6g, %d nodes, %d columns",
        word,
        info.objective_function_value,
        info.mip_dual_bound,
        target,
        info.mip_node_count,
        int(np.count_nonzero(lp.col_upper_)),
    )
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return SolverResult(word, None, np.inf, bound)
    found = info.mip_dual_bound
    return SolverResult(
        word,
        np.array(solver.getSolution().col_value),
        info.objective_function_value,
        max(bound, found) if np.isfinite(found) else bound,
    )


def _run(
    lp: highspy.HighsLp,
    options: SolverOptions,
    *,
    target: float = -np.inf,
    presolve: str = "choose",
) -> highspy.Highs:
    solver = new_solver()
    settings: dict[str, bool | int | float | str] = {
        "random_seed": options.seed,
        "mip_rel_gap": options.gap,
        "mip_abs_gap": ABSOLUTE_GAP,
        "objective_target": target,
        "presolve": presolve,
        "mip_max_nodes": highspy.kHighsIInf if options.nodes is None else options.nodes,
    }
    for name, value in settings.items():
        solver.setOptionValue(name, value)
    solver.passModel(lp)
    solver.run()
    return solver


def _word(status: highspy.HighsModelStatus) -> str:
    words = {
        highspy.HighsModelStatus.kOptimal: "optimal",
        highspy.HighsModelStatus.kObjectiveTarget: "optimal",
        highspy.HighsModelStatus.kSolutionLimit: STOPPED,
        highspy.HighsModelStatus.kInfeasible: "infeasible",
        highspy.HighsModelStatus.kUnboundedOrInfeasible: "infeasible",  # no cost is negative
    }
    if status not in words:
        raise RuntimeError(f"the solver stopped with {status.name}")
    return words[status]
