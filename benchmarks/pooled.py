"""Cases of several evaluations together: what plans find of them, and how much of a gain is kept.

A case is one of `moac eval --json` with `budget`, `seed` and `place`, its place among those of a
seed, length and wording. The same case at two budgets is one case with two answers, so that shares
and intervals over several budgets are of the cases' means.
"""

from __future__ import annotations

import hashlib
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

Case = dict[str, Any]
Stratum = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over `n` cases with its 95 % interval, None for a single case."""

    value: float
    ci95: Interval | None
    n: int


@dataclass(frozen=True, slots=True)
class Quotient:
    """A ratio over `n` cases; None where there is nothing to divide by.

    Its interval is None where chance alone could leave nothing.
    """

    value: float | None
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
    strata: dict[Stratum, list[float]] = {}
    other = {} if less is None else _by_case(cases, less, "nll")
    for key, value in _by_case(cases, method, "nll").items():
        strata.setdefault(key[0], []).append(value - other.get(key, 0.0))
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
    means, drawn, count = resampled(cases, names)
    (ours, theirs), (drawn_ours, drawn_theirs) = _gains(means), _gains(drawn)
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
        ratio_ci95=middle(drawn_ours / drawn_theirs) if bounded else None,
        margin=float(ours - wanted * theirs),
        margin_ci95=middle(drawn_ours - wanted * drawn_theirs),
        held=None if ratio is None else ratio >= wanted,
        n=count,
    )


def quotient(cases: Sequence[Case], method: str, other: str) -> Quotient:
    """What a method finds over what another does of the same cases, with bootstrap's interval."""
    (ours, theirs), (drawn_ours, drawn_theirs), count = resampled(cases, (method, other))
    if theirs <= 0:
        return Quotient(None, None, count)
    bounded = bool((drawn_theirs > 0).all())
    interval = middle(drawn_ours / drawn_theirs) if bounded else None
    return Quotient(float(ours / theirs), interval, count)


def resampled(cases: Sequence[Case], methods: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Shares `[methods]` found of `cases`, the same `[methods, DRAWS]` of cases drawn anew.

    And how many cases. They are drawn within each seed, task, length and wording.
    """
    by_method = [_by_case(cases, method, "score") for method in methods]
    strata: dict[Stratum, list[list[float]]] = {}
    for key in by_method[0]:
        stratum, seed, _ = key
        strata.setdefault((stratum, seed), []).append([scores[key] for scores in by_method])
    total = np.zeros(len(methods))
    drawn = np.zeros((len(methods), DRAWS))
    for name, rows in strata.items():
        scores = np.array(rows).T
        picked = _dice(name).integers(len(rows), size=(DRAWS, len(rows)))
        total += scores.sum(axis=1)
        drawn += scores[:, picked].sum(axis=2)
    count = len(by_method[0])
    return total / count, drawn / count, count


def _dice(stratum: Stratum) -> np.random.Generator:
    """Random numbers of a stratum alone: figures of different cases must vary apart."""
    digest = hashlib.sha256(repr(stratum).encode()).digest()
    return np.random.default_rng(list(digest))


def _stratum(case: Case) -> Stratum:
    """What cases have in common that are alike."""
    return case["task"], case["length"], case.get("wording") or case.get("text")


def _by_case(
    cases: Sequence[Case], method: str, what: str
) -> dict[tuple[Stratum, int, int], float]:
    """Of each case, the mean over the budgets at which a method answered it."""
    answers: dict[tuple[Stratum, int, int], list[float]] = {}
    for case in cases:
        key = (_stratum(case), case["seed"], case["place"])
        answers.setdefault(key, []).append(case[what][method])
    return {key: sum(told) / len(told) for key, told in answers.items()}


def _gains(means: Any) -> tuple[Any, Any]:
    """Of the means of `[method, reference, baseline]`, the gains of the first two."""
    ours, theirs, base = means
    return ours - base, theirs - base


def middle(draws: np.ndarray) -> Interval:
    """The middle 95 % of draws."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
