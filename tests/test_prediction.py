"""From influence to nats: the curve, its interval, and scores between profiled lengths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moac.calibration import CalibrationSample
from moac.planning import HeadLayout
from moac.planning.prediction import Curve, Estimate, SpanCosts, left_out, root, student
from moac_runtime.package.span import DENSE, Rule


def sample(domain: str, length: int) -> CalibrationSample:
    return CalibrationSample(domain, length, (1,), ((0, 1),), (None,))


def test_the_curve_is_found_again() -> None:
    scores = np.array([0.1, 0.5, 1.0, 2.0, 3.0])
    curve = Curve.through(scores, 0.2 * scores**1.5)
    assert curve.power == 1.5
    assert curve.scale == pytest.approx(0.2)
    assert curve.loss(0.0) == 0.0
    assert left_out(list(scores), list(0.2 * scores**1.5)) == pytest.approx(
        list(0.2 * scores**1.5)
    )


def test_losses_that_fall_predict_nothing_lost() -> None:
    scores = np.array([0.1, 0.5, 1.0])
    assert Curve.through(scores, -scores).loss(2.0) == 0.0
    assert Curve.through(np.zeros(3), scores).loss(0.0) == 0.0


def test_a_curve_takes_three_plans() -> None:
    with pytest.raises(ValueError, match="at least 3 measured plans, got 2"):
        left_out([1.0, 2.0], [1.0, 2.0])


def test_intervals_cover_what_they_say() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        scores = generator.uniform(0.2, 3.0, 6)
        truth = 0.3 * scores**1.5
        losses = np.square(np.sqrt(truth) + generator.normal(0, 0.08, 6))
        known, asked = scores[:5], float(scores[5])
        missed = left_out(list(known), list(losses[:5]))
        errors = [root(y) - root(p) for y, p in zip(losses[:5], missed, strict=True)]
        found = Estimate.of(Curve.through(known, losses[:5]).loss(asked), errors)
        inside += found.low <= losses[5] <= found.high
    assert 0.86 <= inside / 400 <= 0.99


def test_students_quantiles() -> None:
    tables = {2: 2.920, 4: 2.132, 5: 2.015, 10: 1.812, 30: 1.697}
    assert {n: student(n) for n in tables} == pytest.approx(tables, rel=0.03)


def test_roots_keep_the_sign() -> None:
    assert [root(4.0), root(-4.0), root(0.0)] == [2.0, -2.0, 0.0]


def test_scores_between_the_profiled_lengths() -> None:
    layout = HeadLayout(num_kv_heads=1, sink=16, block=16, min_span=32, windows=(None,))
    tables = []
    for length, cost in ((64, 1.0), (256, 3.0)):
        table = torch.zeros(1, 1, length // 16 + 1)
        table[..., :-1] = cost
        table[..., :2] = math.inf
        tables.append(table)
    costs = SpanCosts.of([sample("text", 64), sample("text", 256)], tables)
    short = layout.uniform(Rule(32, 0.0))
    found = [costs.score("text", short, n) for n in (32, 64, 128, 256, 512)]
    high = 3.0**1.5
    assert found == pytest.approx([1.0, 1.0, (1 + high) / 2, high, high])
    assert costs.score("text", layout.uniform(DENSE), 128) == 0.0


def test_signs_do_not_average_out_and_wider_spans_never_cost_more() -> None:
    layout = HeadLayout(num_kv_heads=1, sink=0, block=16, min_span=16, windows=(None,))
    one = torch.tensor([[[math.inf, 1.0, -3.0, 2.0, 0.0]]])
    costs = SpanCosts.of([sample("text", 64), sample("text", 64)], [one, -one])
    found = [costs.score("text", layout.uniform(Rule(n, 0.0)), 64) for n in (16, 32, 48, 64)]
    assert found == pytest.approx([3.0**1.5, 3.0**1.5, 2.0**1.5, 0.0])
