"""Plans for the ablation: spans that differ by layer alone, then by head, neither elastic.

    python benchmarks/ablation.py .cache/smollm2-135m-instruct --work-dir .cache/moac -o PLANS

writes PLANS/layer.json and PLANS/head.json, made from the compile's own profile within the same
budget, where every span is a share of the length (alpha 0). `moac eval out/ --against
uniform,PLANS/layer.json,PLANS/head.json` then runs them beside the package's plan, whose rules
are elastic.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from profiled import profiled

from moac.pipeline.plan_file import made_for, sealed, write_plan_file
from moac.pipeline.stages import best_weighted
from moac.planning import Problem, SolverOptions, layerwise_plan
from moac.request import CompileRequest
from moac_runtime.package.span import Rule


def proportional(problem: Problem) -> Problem:
    """The same problem with shares of the length alone, and the smallest span."""
    least = Rule(problem.layout.min_span, 0.0)
    block = problem.layout.block  # within which a rule's jumps were moved
    rules = tuple(rule for rule in problem.rules if -block <= rule.alpha <= 0 or rule == least)
    return replace(problem, rules=rules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=CompileRequest().measuring.samples)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()

    found = profiled(
        options.model, budget=options.budget, samples=options.samples, work_dir=options.work_dir
    )
    problem = proportional(found.problem(found.pairs))
    plans = {
        "layer": layerwise_plan(problem, options=SolverOptions(gap=1e-2)),
        "head": best_weighted(found.bench, problem).plan,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for name, plan in plans.items():
        record = sealed(
            plan, {"model": made_for(found.bench.checkpoint), "budget": options.budget}
        )
        write_plan_file(options.output / f"{name}.json", plan, record, force=True)
        densities = ", ".join(f"{plan.density(n):.3f} at {n}" for n in found.lengths.planned)
        print(f"{name}: density {densities}")


if __name__ == "__main__":
    main()
