"""The stages of planning: which samples are profiled where, and which plan of a front is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moac.calibration import CalibrationSample
from moac.pipeline import stages
from moac.pipeline.stages import halves, validate
from moac_runtime.package.plan import Plan, dense_plan
from moac_runtime.package.span import Rule


def _sample(domain: str, length: int = 1024) -> CalibrationSample:
    return CalibrationSample(domain, length, (1, 2), ((1, 2),), (None,))


def test_every_second_answer_of_a_length_is_profiled_around_a_draft() -> None:
    short = [_sample(domain) for domain in ("retrieval",) * 3 + ("text",) * 2]
    long = [_sample(domain, 4096) for domain in ("retrieval", "user", "user", "documents")]
    first, later = halves([*short, *long])
    assert [sample.domain for sample in later] == ["retrieval", "user"]
    assert [sample.length for sample in later] == [1024, 4096]
    assert [s.domain for s in first] == [
        *("retrieval", "retrieval", "text", "text"),
        *("retrieval", "user", "documents"),
    ]


def _plans(count: int) -> list[Plan]:
    shape: dict[str, Any] = {"sink": 64, "block": 64, "min_span": 128}
    layout = dense_plan(2, 2, **shape, windows=(None, None))
    return [
        Plan(((Rule(64 * (k + 2), 0.25),) * 2,) * 2, **shape, windows=layout.windows)
        for k in range(count)
    ]


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        # Plan by plan, what six unseen samples lose.
        ([[1, 1, 1, 1, 1, 1], [0.5, 1.4, 0.9, 1.2, 0.4, 1.1]], 0),  # less by chance
        ([[1, 1, 1, 1, 1, 1], [0.9, 0.8, 0.9, 0.9, 0.8, 0.9]], 1),  # less in every sample
        ([[1, 1, 1, 1, 1, 1], [1.2, 1.1, 1.2, 1.1, 1.2, 1.1]], 0),
        ([[1] * 6, [0.9, 0.8, 0.9, 0.9, 0.8, 0.9], [0.7, 0.6, 0.7, 0.6, 0.7, 0.6]], 2),
        ([[1] * 6], 0),
    ],
)
def test_another_plan_is_taken_only_where_it_loses_less_by_more_than_chance(
    losses: list[list[float]], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = _plans(len(losses))
    samples = [_sample(domain) for domain in ("retrieval", "documents", "text") * 2]
    found = {id(plan): row for plan, row in zip(plans, losses, strict=True)}

    def loss(bench: Any, sample: CalibrationSample, plan: Plan | None) -> float:
        row = found.get(id(plan), [2.0] * 6)
        return row[next(i for i, s in enumerate(samples) if s is sample)]

    monkeypatch.setattr(stages, "sample_loss", loss)
    monkeypatch.setattr(stages, "unseen_samples", lambda *_: samples)
    lengths: Any = SimpleNamespace(unseen=1536, profiled=(1024, 4096))
    bench: Any = SimpleNamespace(layout=SimpleNamespace(kv=None))
    best, rows = validate(bench, plans, lengths)
    assert best == chosen
    assert [row.name for row in rows][-2:] == ["uniform", "dense"]
    assert rows[0].loss == pytest.approx(1)


def test_a_plan_that_gives_up_the_longest_length_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans = _plans(2)
    extreme = plans[1]

    def loss(bench: Any, sample: CalibrationSample, plan: Plan | None) -> float:
        better = plan is extreme and sample.length < 4096
        return (0.5 if better else 1.0) + 0.01 * len(sample.domain)

    monkeypatch.setattr(stages, "sample_loss", loss)
    monkeypatch.setattr(
        stages,
        "unseen_samples",
        lambda _, length: [_sample(d, length) for d in ("retrieval", "text") * 3],
    )
    lengths: Any = SimpleNamespace(unseen=1536, profiled=(1024, 4096))
    bench: Any = SimpleNamespace(layout=SimpleNamespace(kv=None))
    best, rows = validate(bench, plans, lengths)
    assert best == 0
    assert rows[1].loss < rows[0].loss
