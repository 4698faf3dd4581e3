"""Ways to turn influence into a plan, compared by what the plans lose on held-out cases.

    python benchmarks/influence.py out/ --source .cache/smollm2-135m-instruct --length 2048

Every way plans for one length at the same budget and runs through the package's runtime: greedy
pass keys found, the mean loss of their values, and the loss of running text with its difference to
the uniform plan's on the same windows (95 %). What differs: the form of influence (joint over what
a span masks, as the paper's formula sums it entry by entry, the reference's absolute entries), how
samples are aggregated, whether what answers lose together counts, how much domains weigh or
whether the largest of them decides, and whether retrieval samples ask one question or many, and
count by the value or by the whole answer. All are profiled around the dense model; `moac plan`
profiles every second retrieval sample around drafts of the plan.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from judging import show
from torch import Tensor

from moac.calibration import build_calibration
from moac.checkpoint import open_checkpoint
from moac.evaluation.methods import method_plans
from moac.pipeline.planner import open_workbench
from moac.planning import (
    HeadLayout,
    Objective,
    Problem,
    candidate_rules,
    plan_losses,
    solve_weighted,
    uniform_plan,
)
from moac.planning.objectives import ANSWERS, COUNTING
from moac.planning.problem import Floats
from moac.profiling import attention as influence_attention
from moac.profiling.influence import sample_influence
from moac.request import CompileRequest
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.plan import Plan

SAMPLES = {"retrieval": 9, "whole": 9, "documents": 2, "text": 2, "quiz": 3}
FORMS = ("joint", "entry by entry", "absolute entries")

Aggregate = Callable[[Tensor], Tensor]
"""Samples' influence `[samples, layers, kv_heads, spans]` to costs `[layers, kv_heads, spans]`."""

AGGREGATES: Mapping[str, Aggregate] = {
    "root mean square": lambda t: t.square().mean(0).sqrt(),
    "mean of squares": lambda t: t.square().mean(0),
    "mean of |influence|": lambda t: t.abs().mean(0),
    "mean of positive part": lambda t: t.clamp_min(0).mean(0),
}


OTHERS = {name: how.weight for name, how in COUNTING.items()}
ALIKE = {"retrieval": 1.0, "documents": 1.0, "text": 1.0}


@dataclass(frozen=True, slots=True)
class Way:
    """How influence becomes costs. `powers`: of a domain's aggregate, head by head, one if absent.

    `retrieval`: the kind of sample of that domain.
    """

    name: str
    form: str = "joint"
    aggregate: str = "root mean square"
    retrieval: str = "retrieval"
    gain: float = ANSWERS.gain
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"retrieval": ANSWERS.weight, **OTHERS}
    )
    powers: Mapping[str, int] = field(
        default_factory=lambda: {name: how.power for name, how in COUNTING.items()}
    )


def first_powers(name: str, weights: Mapping[str, float], **more: str) -> Way:
    """No squares, and the domains weighed by `weights`."""
    return Way(name, weights=weights, powers={}, gain=0.0, **more)


WAYS = (
    Way("in use"),
    Way("entry by entry (the paper's formula)", form="entry by entry"),
    Way("absolute entries (the reference)", form="absolute entries"),
    *(Way(name, aggregate=name) for name in AGGREGATES if name != "root mean square"),
    Way("all squared", powers=dict.fromkeys(ALIKE, 2)),
    Way("many questions a sample", retrieval="quiz"),
    Way("whole answers", retrieval="whole"),
    *(Way(f"gain {gain:g}", gain=gain) for gain in (0, 1, 2)),
    first_powers("first powers, all alike", ALIKE),
    first_powers("first powers, all alike, many questions", ALIKE, retrieval="quiz"),
    first_powers("first powers, 2, 0.25, 1", {"retrieval": 2, "documents": 0.25, "text": 1}),
    first_powers("first powers, 4, 0.25, 1", {"retrieval": 4, "documents": 0.25, "text": 1}),
    Way("retrieval x 16", weights={"retrieval": 16, **OTHERS}),
    Way("retrieval alone", weights={"retrieval": 1.0}),
)
LARGEST = "least largest domain"
_ROUNDS, _STEP = 24, 0.5


class _Forms(influence_attention._SpanSums):
    """Every form of influence in one backward pass; `made` collects them, last layer first."""

    made: ClassVar[list[Tensor]] = []

    def __init__(self, kv_heads: int, length: int, *rest: Any) -> None:
        super().__init__(kv_heads, length, *rest)
        self.forms = torch.zeros(2, *self.total.shape, dtype=torch.float64)
        self.forms[:, torch.isinf(self.total)] = float("inf")
        self.made.append(self.forms)

    def add(self, weights: Tensor, flows: Tensor, left: Tensor | None) -> None:
        super().add(weights, flows, left)
        entries = -flows / (1 - weights).clamp_min(influence_attention._LEAST_MASS_LEFT)
        first = self.sink // self.block + 1
        for form, tile in zip(self.forms, (entries, entries.abs()), strict=True):
            change = self._beyond(tile).sum((1, 2), dtype=torch.float64)
            count = min(change.shape[-1] - 1, form.shape[1] - first)
            form[:, first : first + count] += change[:, 1 : 1 + count]


def profile(options: argparse.Namespace, layout: HeadLayout) -> dict[tuple[str, str], Tensor]:
    """Influence `[samples, layers, kv_heads, spans]` by form and kind of sample."""
    checkpoint = open_checkpoint(options.source)
    bench = open_workbench(checkpoint, layout, CompileRequest(budget=options.budget), None)
    found: dict[tuple[str, str], list[Tensor]] = {}
    for kind, count in SAMPLES.items():
        samples = build_calibration(
            bench.reader,
            bench.tokenizer,
            samples_per_length={options.length: count},
            domains=("retrieval" if kind == "whole" else kind,),
        )
        for sample in samples:
            if kind == "whole":
                sample = replace(sample, values=())
            _Forms.made.clear()
            with patch.object(influence_attention, "_SpanSums", _Forms):
                joint = sample_influence(bench.model, checkpoint.spec, sample, layout)
            others = torch.stack(_Forms.made[::-1], dim=1).float()  # [forms, layers, heads, spans]
            missing = joint.shape[-1] - others.shape[-1]
            others = torch.nn.functional.pad(others, (0, missing))
            for form, table in zip(FORMS, (joint, *others), strict=True):
                found.setdefault((form, kind), []).append(table)
    return {name: torch.stack(tables) for name, tables in found.items()}


def plan_of(
    way: Way,
    tables: Mapping[tuple[str, str], Tensor],
    layout: HeadLayout,
    length: int,
    budget: float,
) -> Plan:
    """The plan that loses least by the costs that `way` makes of influence."""
    costs = costs_of(way, tables, layout, length, budget)
    return solved(costs, way.weights, layout, length, budget)


def least_largest(
    tables: Mapping[tuple[str, str], Tensor], layout: HeadLayout, length: int, budget: float
) -> Plan:
    """The plan whose largest domain loses least, each in units of the uniform plan's loss.

    Weights move towards the domain that loses most until none does more than another; the best
    plan met is taken.
    """
    costs = costs_of(Way("", weights=ALIKE), tables, layout, length, budget)
    weights = dict(ALIKE)
    plans: list[tuple[float, Plan]] = []
    for _ in range(_ROUNDS):
        plan = solved(costs, weights, layout, length, budget)
        lost = {
            d: plan_losses(plan, [Objective(d, length, table)])[0] for d, table in costs.items()
        }
        plans.append((max(lost.values()), plan))
        mean = sum(lost.values()) / len(lost)
        weights = {d: w * (lost[d] / mean) ** _STEP for d, w in weights.items()}
    return min(plans, key=lambda met: met[0])[1]


def costs_of(
    way: Way,
    tables: Mapping[tuple[str, str], Tensor],
    layout: HeadLayout,
    length: int,
    budget: float,
) -> dict[str, Floats]:
    """Costs `[layers, kv_heads, spans]` by domain, in units of what the uniform plan loses."""
    uniform = uniform_plan(layout, budget=budget, lengths=(length,))
    found = {}
    for domain in (domain for domain, weight in way.weights.items() if weight):
        kind = way.retrieval if domain == "retrieval" else domain
        cost = AGGREGATES[way.aggregate](tables[way.form, kind].double()).numpy()
        rising = np.maximum.accumulate(cost[..., ::-1], axis=-1)[..., ::-1]
        cost = rising ** way.powers.get(domain, 1)
        unit = plan_losses(uniform, [Objective("", length, cost)])[0]
        if domain == "retrieval":
            cost = cost + way.gain * tables[way.form, kind].double().mean(0).numpy()
        found[domain] = cost / unit
    return found


def solved(
    costs: Mapping[str, Floats],
    weights: Mapping[str, float],
    layout: HeadLayout,
    length: int,
    budget: float,
) -> Plan:
    """The plan of least weighted cost at one length."""
    total = np.sum([weights[domain] * cost for domain, cost in costs.items()], axis=0)
    rules = candidate_rules((length,), block=layout.block, min_span=layout.min_span)
    problem = Problem(layout, rules, (length,), (Objective("all", length, total),), budget)
    return solve_weighted(problem, {"all": 1.0}).plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--source", required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--cases", type=int, default=32)
    parser.add_argument("--texts", type=int, default=8)
    options = parser.parse_args()

    artifact, checkpoint = open_artifact(options.package), open_checkpoint(options.source)
    layout = HeadLayout.of(artifact.plan)
    tables = profile(options, layout)
    uniform = uniform_plan(layout, budget=options.budget, lengths=(options.length,))
    plans = {"uniform": uniform, "dense": method_plans(artifact, ["dense"])["dense"](0)}
    for way in WAYS:
        plans[way.name] = plan_of(way, tables, layout, options.length, options.budget)
    plans[LARGEST] = least_largest(tables, layout, options.length, options.budget)
    sizes = {"length": options.length, "cases": options.cases, "texts": options.texts}
    show(artifact, checkpoint, plans, **sizes)


if __name__ == "__main__":
    main()
