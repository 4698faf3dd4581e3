"""What a plan will lose, learned by measuring a few, and the density that a loss asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from moac.calibration import CalibrationSample
from moac.lengths import Lengths
from moac.pipeline.stages import (
    Measured,
    Workbench,
    best_weighted,
    measure,
    optimise,
    unseen_samples,
)
from moac.planning import FrontPoint, Problem, smallest_budget
from moac.planning.between import spend_between
from moac.planning.prediction import LEVEL, Curve, Estimate, SpanCosts, left_out, root
from moac.progress.progress import stage
from moac_runtime.errors import BudgetError
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE

MEAN = "mean"

LADDER = (0.05, 0.15, 0.3, 0.5, 0.75)  # of the way from the smallest density to dense
_DENSITY_STEP = 1 / 256

ProblemAt = Callable[[float], Problem]


@dataclass(frozen=True, slots=True)
class Rung:
    """A plan measured to learn from: scores, and increases in nats a token, by domain."""

    name: str
    density: float
    scores: Mapping[str, float]
    increases: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class LossModel:
    """Predicts how much more a plan loses than dense at `length` tokens, by domain and on mean.

    `errors`: of each rung under the curves through the others, of roots, by domain and for the
    mean over domains.
    """

    length: int
    costs: SpanCosts
    curves: Mapping[str, Curve]
    errors: Mapping[str, Sequence[float]]
    ladder: tuple[Rung, ...]

    @classmethod
    def fitted(cls, length: int, costs: SpanCosts, ladder: Sequence[Rung]) -> LossModel:
        """The curves through the measured plans of `ladder`, three at least."""
        scores = {d: [rung.scores[d] for rung in ladder] for d in ladder[0].increases}
        losses = {d: [rung.increases[d] for rung in ladder] for d in scores}
        missed = {d: left_out(scores[d], losses[d]) for d in scores}
        losses[MEAN] = [_mean(rung) for rung in zip(*losses.values(), strict=True)]
        missed[MEAN] = [_mean(rung) for rung in zip(*missed.values(), strict=True)]
        return cls(
            length=length,
            costs=costs,
            curves={d: Curve.through(np.array(scores[d]), np.array(losses[d])) for d in scores},
            errors={
                name: [root(y) - root(p) for y, p in zip(losses[name], found, strict=True)]
                for name, found in missed.items()
            },
            ladder=tuple(ladder),
        )

    def predict(self, plan: Plan) -> dict[str, Estimate]:
        """An estimate for each domain and, as "mean", for the mean over domains."""
        scores = {domain: self.costs.score(domain, plan, self.length) for domain in self.curves}
        return self._estimates(scores)

    def _estimates(self, scores: Mapping[str, float]) -> dict[str, Estimate]:
        losses = {name: curve.loss(scores[name]) for name, curve in self.curves.items()}
        losses[MEAN] = _mean(list(losses.values()))
        return {name: Estimate.of(loss, self.errors[name]) for name, loss in losses.items()}

    def record(self, front: Sequence[FrontPoint], plan: Plan) -> dict[str, Any]:
        """What `plan.json` tells: `predicted_loss` of the plan, and `prediction`, its making."""
        found = self.predict(plan)
        return {
            "predicted_loss": {
                "length": self.length,
                "level": LEVEL,
                "measured_plans": len(self.ladder),
                **found[MEAN].to_json(),
                "domains": {name: found[name].to_json() for name in self.curves},
            },
            "prediction": {
                "curves": {name: asdict(curve) for name, curve in self.curves.items()},
                "ladder": [
                    {
                        "plan": rung.name,
                        "density": rung.density,
                        "predicted": self._estimates(rung.scores)[MEAN].loss,
                        "measured": _mean(list(rung.increases.values())),
                        "scores": dict(rung.scores),
                        "increases": dict(rung.increases),
                    }
                    for rung in self.ladder
                ],
                "front": [
                    {"plan": f"plan {number}", **self.predict(point.plan)[MEAN].to_json()}
                    for number, point in enumerate(front, start=1)
                ],
            },
        }


def learn(
    bench: Workbench,
    samples: Sequence[CalibrationSample],
    tables: Sequence[Tensor],
    lengths: Lengths,
    problem_at: ProblemAt,
) -> LossModel:
    """Measure planned plans of several densities, and fit losses to scores."""
    costs = SpanCosts.of(samples, tables)
    with stage("predict"):
        held_out = unseen_samples(bench, lengths.unseen)
        dense = measure(bench, held_out, "dense", None)
        rungs = [
            _rung(measure(bench, held_out, name, plan), dense, plan, costs, lengths.unseen)
            for name, plan in _ladder_plans(bench, lengths, problem_at).items()
        ]
    return LossModel.fitted(lengths.unseen, costs, rungs)


def smallest_within(
    bench: Workbench, lengths: Lengths, problem_at: ProblemAt, model: LossModel, limit: float
) -> tuple[Problem, list[FrontPoint]]:
    """The problem of the smallest density that keeps the loss, and the plans of it that do.

    Kept is the upper end of the interval of the mean over domains. Bisects over densities, a
    density counting by the plan that loses least over all lengths together. Raises BudgetError
    where even dropping one block loses too much.
    """
    low, high = _densities(bench, lengths)
    with stage("bisect"):
        point = best_weighted(bench, problem_at(high))
        _check_reachable(model, point, limit, high)
        smallest = best_weighted(bench, problem_at(low))
        if _keeps(model, smallest, limit):
            point, high = smallest, low
        steps = math.ceil(math.log2(max((high - low) / _DENSITY_STEP, 1)))
        for _ in range(steps):
            middle = (low + high) / 2
            found = best_weighted(bench, problem_at(middle))
            if _keeps(model, found, limit):
                point, high = found, middle
            else:
                low = middle
    problem = problem_at(high)
    first, *others = optimise(bench, problem, lengths, point)
    return problem, [first, *(other for other in others if _keeps(model, other, limit))]


def most_solves() -> int:
    """Programs that a bisection over densities solves at most."""
    return 2 + math.ceil(math.log2(1 / _DENSITY_STEP))


def _keeps(model: LossModel, point: FrontPoint, limit: float) -> bool:
    return model.predict(point.plan)[MEAN].high <= limit


def _check_reachable(model: LossModel, point: FrontPoint, limit: float, density: float) -> None:
    least = model.predict(point.plan)[MEAN].high
    if least > limit:
        raise BudgetError(
            f"no plan keeps --max-loss {limit:g}: even at density {density:.4f}, one block short "
            f"of dense, up to {least:.4f} nats a token may be lost; give --max-loss "
            f"{math.ceil(least * 1e4) / 1e4:g} or more"
        )


def _densities(bench: Workbench, lengths: Lengths) -> tuple[float, float]:
    """The smallest share of memory there is, and the one that drops a single block."""
    layout, longest = bench.layout, lengths.planned[-1]
    bits = layout.widths[0]
    block = layout.block * (1 if layout.kv is None else layout.kv.token_bytes(bits))
    dense = layout.dense_tokens(longest) * layout.token_memory
    most = layout.held(layout.uniform(replace(DENSE, bits=bits)), longest)
    return smallest_budget(layout, lengths.planned)[0], (most - block) / dense


def _ladder_plans(bench: Workbench, lengths: Lengths, problem_at: ProblemAt) -> dict[str, Plan]:
    """What the solver makes of a few densities, the same whatever the budget.

    Plans of another making would teach another curve: a uniform plan of the same score loses
    more, since it spends its tokens on heads that the profile knows little of.
    """
    low, high = _densities(bench, lengths)
    densities = [low + share * (high - low) for share in LADDER]
    unit = "density" if bench.layout.kv is None else "bytes"
    problems = {f"{unit} {share:.3f}": problem_at(share) for share in densities}
    return {
        name: spend_between(problem, best_weighted(bench, problem).plan)
        for name, problem in problems.items()
    }


def _rung(row: Measured, dense: Measured, plan: Plan, costs: SpanCosts, length: int) -> Rung:
    return Rung(
        name=row.name,
        density=plan.density(length),
        scores={domain: costs.score(domain, plan, length) for domain in dense.losses},
        increases={domain: row.losses[domain] - dense.losses[domain] for domain in dense.losses},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
