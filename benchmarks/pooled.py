"""Cases of several evaluations together: what plans find of them, and how much of a gain is kept.

A case is one of `moac eval --json` with `budget`, `seed` and `place`, its place among those of a
seed, length and wording. The same case at two budgets is one case with two answers, so that shares
and intervals over several budgets are of the cases' means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moac.evaluation.intervals import (
    Interval,
    mean_interval,
    share_interval,
    stratified_interval,
)

DRAWS = 10_000
_SEED = 0

Case = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over `n` cases with its 95 % interval, None for a single case."""

    value: float
    ci95: Interval | None
    n: int


@dataclass(frozen=True, slots=True)
class Kept:
    """How much of what `reference` finds beyond `baseline` a method finds too, paired by case.

    `ratio`: of the two gains; None where the reference gains nothing. Its interval is None where
    chance alone could leave the reference without a gain. `margin`: the method's gain less
    `wanted` of the reference's, per case. `held`: whether the ratio reaches `wanted`.
    """

    method: str
    reference: str
    baseline: str
    wanted: float
    gain: float
    reference_gain: float
    ratio: float | None
    ratio_ci95: Interval | None
    margin: float
    margin_ci95: Interval
    held: bool | None
    n: int

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)


def found(cases: Sequence[Case], method: str) -> Figure:
    """The share of `cases` that a method finds; Wilson's interval."""
    scores = list(_by_case(cases, method, "score").values())
    return Figure(float(np.mean(scores)), share_interval(scores), len(scores))


def loss(cases: Sequence[Case], method: str) -> Figure:
    """The mean NLL of the right answers, in nats a token; Student's interval."""
    losses = list(_by_case(cases, method, "nll").values())
    return Figure(float(np.mean(losses)), mean_interval(losses), len(losses))


def text_loss(cases: Sequence[Case], method: str, *, less: str | None = None) -> Figure:
    """What a method loses on text, in nats a token, less what another does on the same windows.

    The mean over lengths and kinds of text; Welch's interval, over the windows within each.
    """
    strata: dict[tuple[object, ...], list[float]] = {}
    other = {} if less is None else _by_case(cases, less, "nll")
    for key, value in _by_case(cases, method, "nll").items():
        _, length, kind, _ = key
        strata.setdefault((length, kind), []).append(value - other.get(key, 0.0))
    groups = list(strata.values())
    value = float(np.mean([np.mean(group) for group in groups]))
    return Figure(value, stratified_interval(groups), sum(map(len, groups)))


def kept_gain(
    cases: Sequence[Case], method: str, reference: str, *, baseline: str, wanted: float
) -> Kept:
    """The share of the reference's gain over `baseline` that a method keeps.

    The interval is of a bootstrap that draws cases anew within each seed and length, all answers
    to a case together.
    """
    names = (method, reference, baseline)
    strata = [
        np.array([list(_by_case(part, name, "score").values()) for name in names])
        for part in _strata(cases)
    ]
    count = sum(scores.shape[1] for scores in strata)
    ours, theirs = _gains(sum(scores.sum(axis=1) for scores in strata) / count)
    rng = np.random.default_rng(_SEED)
    drawn_ours, drawn_theirs = _gains(sum(_drawn_sums(rng, scores) for scores in strata) / count)
    ratio = float(ours / theirs) if theirs > 0 else None
    bounded = ratio is not None and bool((drawn_theirs > 0).all())
    return Kept(
        method=method,
        reference=reference,
        baseline=baseline,
        wanted=wanted,
        gain=float(ours),
        reference_gain=float(theirs),
        ratio=ratio,
        ratio_ci95=_middle(drawn_ours / drawn_theirs) if bounded else None,
        margin=float(ours - wanted * theirs),
        margin_ci95=_middle(drawn_ours - wanted * drawn_theirs),
        held=None if ratio is None else ratio >= wanted,
        n=count,
    )


def _by_case(cases: Sequence[Case], method: str, what: str) -> dict[tuple[object, ...], float]:
    """Of each case, the mean over the budgets at which a method answered it."""
    answers: dict[tuple[object, ...], list[float]] = {}
    for case in cases:
        part = case.get("wording") or case.get("text")
        key = (case["seed"], case["length"], part, case["place"])
        answers.setdefault(key, []).append(case[what][method])
    return {key: sum(told) / len(told) for key, told in answers.items()}


def _strata(cases: Sequence[Case]) -> list[list[Case]]:
    groups: dict[tuple[int, int], list[Case]] = {}
    for case in cases:
        groups.setdefault((case["seed"], case["length"]), []).append(case)
    return list(groups.values())


def _gains(means: Any) -> tuple[Any, Any]:
    """Of the means of `[method, reference, baseline]`, the gains of the first two."""
    ours, theirs, base = means
    return ours - base, theirs - base


def _drawn_sums(rng: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    """Sums `[methods, DRAWS]` over the cases of `scores` `[methods, cases]`, drawn anew."""
    cases = scores.shape[1]
    return scores[:, rng.integers(cases, size=(DRAWS, cases))].sum(axis=2)


def _middle(draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
