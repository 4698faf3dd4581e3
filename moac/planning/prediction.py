"""From influence to a loss in nats: what a plan will cost, with an interval, before it is run.

Influence ranks plans but is in no unit of loss. A curve through a few measured plans turns it
into one, for each domain by itself:

    increase of loss over dense = scale * score ** power,
    score = sum over heads of (root mean square of influence over samples) ** 1.5

The exponent lies between the first order (1) and the Fisher information (2): it ranks random
plans better than both, and leaves a power near 1 (benchmarks/prediction.py). The curve is fitted
to the square roots of the losses, on which errors are about alike from the smallest losses to the
largest, and the interval is symmetric there: Student's t on the errors that each measured plan
has under the curve fitted to the others (leave one out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from moac.planning.objectives import monotone, of_rounding, of_spans, stacked
from moac.planning.problem import Floats, Objective, plan_losses
from moac_runtime.package.plan import Plan

if TYPE_CHECKING:
    from moac.calibration import CalibrationSample

LEVEL = 0.9
_POWERS = (0.75, 1.0, 1.25, 1.5)
_EXPONENT = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class SpanCosts:
    """What each span typically moves, by domain and length: `tables[domain]`, shortest first."""

    tables: Mapping[str, tuple[Objective, ...]]

    @classmethod
    def of(cls, samples: Sequence[CalibrationSample], tables: Sequence[Tensor]) -> SpanCosts:
        """Root mean squares over samples, since signs average out at the dense model."""
        return cls(
            {
                domain: tuple(
                    _span_costs(domain, length, group) for length, group in by_length.items()
                )
                for domain, by_length in stacked(samples, tables).items()
            }
        )

    def score(self, domain: str, plan: Plan, length: int) -> float:
        """The summed cost of `plan` at `length`, between profiled lengths on a line in log N."""
        objectives = self.tables[domain]
        scores = plan_losses(plan, objectives)
        places = [math.log(objective.length) for objective in objectives]
        return float(np.interp(math.log(length), places, scores))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A loss in nats a token above the dense model's, and the interval it lies in."""

    loss: float
    low: float
    high: float

    @classmethod
    def of(cls, loss: float, errors: Sequence[float]) -> Estimate:
        """`loss` with the interval that `errors` of left-out plans, of roots, leave to another."""
        spread = math.sqrt(sum(error * error for error in errors) / len(errors))
        half, root = spread * student(len(errors) - 1), math.sqrt(loss)
        return cls(loss, max(root - half, 0.0) ** 2, (root + half) ** 2)

    def to_json(self) -> dict[str, Any]:
        """`loss` and `interval`."""
        return {"loss": self.loss, "interval": [self.low, self.high]}


@dataclass(frozen=True, slots=True)
class Curve:
    """Loss over score: `scale * score ** power`; through nothing dropped, nothing lost."""

    scale: float
    power: float

    def loss(self, score: float) -> float:
        """The increase of loss at `score`, in nats a token."""
        return float(self.scale * score**self.power)

    @classmethod
    def through(cls, scores: Floats, losses: Floats) -> Curve:
        """The curve nearest to the roots of measured `losses`."""
        return min((_scaled(power, scores, losses) for power in _POWERS), key=lambda fit: fit[0])[
            1
        ]


def left_out(scores: Sequence[float], losses: Sequence[float]) -> list[float]:
    """What the curve through all other plans predicts for each plan, in nats a token.

    Raises ValueError for fewer than three plans.
    """
    if len(scores) < 3:
        raise ValueError(f"a curve must have at least 3 measured plans, got {len(scores)}")
    x, y = np.array(scores), np.array(losses)
    return [
        Curve.through(np.delete(x, i), np.delete(y, i)).loss(float(x[i])) for i in range(len(x))
    ]


def root(loss: float) -> float:
    """The square root with the sign of a loss that came out lower than dense."""
    return math.copysign(math.sqrt(abs(loss)), loss)


def student(freedom: int) -> float:
    """The 0.95 quantile of Student's distribution, so that 90 % lie within it to both sides."""
    z = 1.6448536269514722  # Cornish and Fisher's expansion, within 3 % from 2 up
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + float(sum(term / freedom**power for power, term in enumerate(terms, start=1)))


def _scaled(power: float, scores: Floats, losses: Floats) -> tuple[float, Curve]:
    """The curve of one power, and how far it misses the roots."""
    x, y = scores ** (power / 2), np.sign(losses) * np.sqrt(np.abs(losses))
    total = float(x @ x)
    slope = max(float(x @ y) / total, 0.0) if total > 0 else 0.0
    return float(np.square(y - slope * x).sum()), Curve(slope**2, power)


def _span_costs(domain: str, length: int, tables: Floats) -> Objective:
    """What each span adds to the score, a wider one never more, and rounding its keys."""
    spans = of_spans(tables)
    rounding = {bits: _sizes(found) ** _EXPONENT for bits, found in of_rounding(tables).items()}
    return Objective(domain, length, monotone(_sizes(spans)) ** _EXPONENT, rounding)


def _sizes(tables: Floats) -> Floats:
    """Root mean squares over samples."""
    found: Floats = np.sqrt(np.square(tables).mean(0))
    return found
