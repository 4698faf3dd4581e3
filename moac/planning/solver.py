"""Running HiGHS on a planning program: relax, search a small core, then prove on what is left.

The linear relaxation of a knapsack is nearly whole and costs milliseconds. Its reduced costs say
which choices a good plan draws from (the core, searched first) and, once a plan is known, which
choices no better plan can contain, so that the last search sees few columns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import highspy
import numpy as np

from moac.planning.program import Floats

ABSOLUTE_GAP = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverOptions:
    """`time_limit`: seconds a solve may take, None for as long as it needs.

    `gap`: the share of the loss (above the loss of the best rules without a budget) by which the
    result may miss the optimum; 0 asks for a proof.
    """

    time_limit: float | None = None
    gap: float = 1e-4
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """`status`: "optimal", "time limit" or "infeasible". `values` `[columns]` or None; no solution
    has less than `bound`, in the program's own units.
    """

    status: str
    values: Floats | None
    objective: float
    bound: float


def solve(lp: highspy.HighsLp, *, core: int, options: SolverOptions) -> Outcome:
    """Minimise `lp`, whose objective is never negative. `core`: columns to search first, or 0."""
    limit = np.inf if options.time_limit is None else options.time_limit
    deadline = time.perf_counter() + limit
    highspy.Highs.resetGlobalScheduler(True)  # it keeps the thread count of the first solve
    integrality, upper = lp.integrality_, np.array(lp.col_upper_)
    lp.integrality_ = []
    relaxed = _run(lp, options, deadline)
    status = relaxed.getModelStatus()
    lp.integrality_ = integrality
    if status != highspy.HighsModelStatus.kOptimal:
        return Outcome(_word(status), None, np.inf, 0.0)
    bound = max(relaxed.getInfo().objective_function_value, 0.0)
    reduced = np.array(relaxed.getSolution().col_dual)
    first = Outcome("infeasible", None, np.inf, bound)
    if 0 < core < len(reduced):
        lp.col_upper_ = np.where(reduced > np.partition(reduced, core)[core], 0.0, upper)
        first = _search(lp, options, deadline, bound=bound)
        if first.objective - bound <= options.gap * first.objective + ABSOLUTE_GAP:
            return Outcome("optimal", first.values, first.objective, bound)
    lp.col_upper_ = np.where(reduced > first.objective - bound + 1e-6, 0.0, upper)
    last = _search(lp, options, deadline, bound=bound)
    best = last if last.objective <= first.objective else first
    proved = first.values is not None and last.status == "infeasible"  # nothing better is left
    return Outcome(
        "optimal" if proved else last.status,
        best.values,
        best.objective,
        max(bound, last.bound),
    )


def _search(
    lp: highspy.HighsLp, options: SolverOptions, deadline: float, *, bound: float
) -> Outcome:
    """Branch and bound until the gap is closed, to the solver's own bound or to `bound`."""
    target = bound * (1 + options.gap)
    solver = _run(lp, options, deadline, target=target)
    if solver.getModelStatus() == highspy.HighsModelStatus.kSolveError:
        # HiGHS 1.15 can presolve a small program to a point that breaks a row, and notices.
        solver = _run(lp, options, deadline, target=target, presolve="off")
    status, info = solver.getModelStatus(), solver.getInfo()
    word = _word(status)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Outcome(word, None, np.inf, bound)
    found = info.mip_dual_bound
    return Outcome(
        word,
        np.array(solver.getSolution().col_value),
        info.objective_function_value,
        max(bound, found) if np.isfinite(found) else bound,
    )


def _run(
    lp: highspy.HighsLp,
    options: SolverOptions,
    deadline: float,
    *,
    target: float = -np.inf,
    presolve: str = "choose",
) -> highspy.Highs:
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    settings: dict[str, bool | int | float | str] = {
        "output_flag": False,
        "threads": 1,  # the same plan on every machine
        "random_seed": options.seed,
        "mip_rel_gap": options.gap,
        "mip_abs_gap": ABSOLUTE_GAP,
        "objective_target": target,
        "presolve": presolve,
        "time_limit": max(deadline - time.perf_counter(), 0.0),
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
        highspy.HighsModelStatus.kTimeLimit: "time limit",
        highspy.HighsModelStatus.kInfeasible: "infeasible",
        highspy.HighsModelStatus.kUnboundedOrInfeasible: "infeasible",  # no cost is negative
    }
    if status not in words:
        raise RuntimeError(f"the solver stopped with {status.name}")
    return words[status]
