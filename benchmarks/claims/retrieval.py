"""How far retrieval reaches at equal mean span, and how much is found at equal density.

A plan reaches a length where it finds 90 % and more of the pass keys that the dense model finds
there, and at every shorter length measured. At a mean span of S tokens a plan of budget b is
measured at S / b tokens; equal spans at these and at shorter lengths too. Up to S tokens nothing
is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from evaluated import DENSE
from made import UNIFORM
from pooled import Case, Quotient, found, middle, quotient, resampled
from told import percent, table

from claims.claim import Claim, times
from claims.setting import OURS, Setting
from moac_runtime.package.plan import Plan

KEPT = 0.9
FLOOR = 0.1
_REACH = "3.9x"
_FOUND = "1.5x to 7.1x"


def measure(setting: Setting) -> dict[str, Any]:
    """Pass keys at every budget and length, and where equal spans begin to lose them."""
    setting.prepare(setting.budgets)
    cases: list[Case] = []
    spans: list[dict[str, Any]] = []
    lengths = sorted({*setting.lengths, *setting.reached})
    for budget in setting.budgets:
        plans = {OURS: setting.plan(budget), UNIFORM: setting.uniform(budget, lengths)}
        cases += setting.passkeys(plans, budget, lengths)
        spans += [_spans(plans, budget, length) for length in lengths]
    for length in setting.stretched:
        share = setting.span / length
        plans = {UNIFORM: setting.uniform(share, [length], f"{UNIFORM}-{length}")}
        cases += setting.passkeys(plans, share, [length])
        spans.append(_spans(plans, share, length))
    return {
        "span": setting.span,
        "effort": setting.effort,
        "budgets": list(setting.budgets),
        "lengths": list(setting.lengths),
        "reached": setting.reached,
        "stretched": setting.stretched,
        "spans": spans,
        "cases": cases,
    }


def _spans(plans: Mapping[str, Path], budget: float, length: int) -> dict[str, Any]:
    """The mean span in tokens that each of `plans` has at a length."""
    read = {name: Plan.from_json(json.loads(path.read_bytes())) for name, path in plans.items()}
    means = {name: length * plan.density(length) for name, plan in read.items()}
    return {"budget": budget, "length": length, "mean": means}


@dataclass(frozen=True, slots=True)
class Reach:
    """The length that a method reaches, and the same of cases drawn anew.

    `longest`: whether it is the longest that could be told, so that it may reach further.
    """

    length: int
    drawn: np.ndarray
    longest: bool


Point = tuple[int, list[Case]]
"""A length and its cases."""


def reach(points: Sequence[Point], method: str, *, span: int) -> Reach:
    """How far a method reaches over `points`, ascending, from `span` on."""
    lengths = np.array([span, *(length for length, _ in points)])
    held, drawn = [], []
    for _, cases in points:
        (ours, dense), (drawn_ours, drawn_dense), _ = resampled(cases, (method, DENSE))
        held.append(ours >= KEPT * dense)
        drawn.append(drawn_ours >= KEPT * drawn_dense)
    steps = int(np.cumprod(held).sum())
    steps_drawn = np.cumprod(drawn, axis=0).sum(axis=0)
    return Reach(int(lengths[steps]), lengths[steps_drawn], steps == len(points))


def near_floor(cases: Sequence[Case]) -> bool:
    """Whether dense itself finds next to nothing, so that no plan can be told by it."""
    interval = found(cases, DENSE).ci95
    return interval is not None and interval[0] < FLOOR


def claims(part: dict[str, Any]) -> Iterator[Claim]:
    """Reach, then what is found at every budget."""
    span, effort = part["span"], part["effort"]
    yield Claim(
        f"context at which {KEPT:.0%} of dense's pass keys are found, at a mean span of {span} "
        "tokens, times uniform's",
        _reached(part),
        _REACH,
        f"pass keys in unseen wordings, {effort} plans at {_told_points(part, OURS)} tokens, "
        f"uniform at {_told_points(part, UNIFORM)}; bootstrap over cases",
        _floor_note(_at_span(part)),
    )
    for budget in part["budgets"]:
        cases = _grid(part, budget)
        yield Claim(
            f"pass keys found at density {budget:g}, times uniform's",
            _quotient(cases),
            _FOUND,
            f"unseen wordings at {', '.join(map(str, part['lengths']))} tokens, "
            f"{found(cases, DENSE).n} cases, {effort} plan; paired bootstrap",
            _floor_note(cases),
        )


def _reached(part: dict[str, Any]) -> str:
    """The ratio of what both reach; lengths count up to where dense is near the floor."""
    points = {method: _usable(_points(part, method)) for method in (OURS, UNIFORM)}
    if not all(points.values()):
        return "not told"
    ours, uniform = (reach(p, method, span=part["span"]) for method, p in points.items())
    told = f"{_told(ours)} to {_told(uniform)} tokens"
    if uniform.longest:
        return f"not told: {told}"
    interval = middle(ours.drawn / uniform.drawn)
    return f"{times(ours.length / uniform.length, interval, least=ours.longest)}: {told}"


def _usable(points: Sequence[Point]) -> list[Point]:
    return list(takewhile(lambda point: not near_floor(point[1]), points))


def _told(found: Reach) -> str:
    return f"{found.length}{' and more' if found.longest else ''}"


def _quotient(cases: Sequence[Case]) -> str:
    shares = " to ".join(percent(found(cases, method).value) for method in (OURS, UNIFORM))
    ratio: Quotient = quotient(cases, OURS, UNIFORM)
    return f"{times(ratio.value, ratio.ci95)}: {shares} %"


def details(part: dict[str, Any]) -> str:
    """What was found at every point, in Markdown."""
    cases = _at_span(part)
    means = {s["length"]: s["mean"] for s in part["spans"] if _is_at_span(part, s)}
    rows = [
        [
            length,
            *(_span(means[length].get(method)) for method in (UNIFORM, OURS)),
            *_row([c for c in cases if c["length"] == length]),
        ]
        for length in _lengths(cases)
    ]
    grid = [
        [f"{budget:g}", length, *_row([c for c in _grid(part, budget) if c["length"] == length])]
        for budget in part["budgets"]
        for length in part["lengths"]
    ]
    shown = ["cases", DENSE, UNIFORM, OURS]
    at_span = table(["tokens", "uniform span", "our mean span", *shown], rows)
    return (
        "## Retrieval\n\nPass keys found in unseen wordings, percent with the 95 % interval "
        f"(Wilson). At a mean span of {part['span']} tokens:\n\n"
        f"{at_span}\n\nAt equal density:\n\n"
        f"{table(['density', 'tokens', *shown], grid)}"
    )


def _row(cases: Sequence[Case]) -> list[object]:
    return [found(cases, DENSE).n, *(_share(cases, method) for method in (DENSE, UNIFORM, OURS))]


def _span(tokens: float | None) -> str:
    return "-" if tokens is None else f"{tokens:.0f}"


def _share(cases: Sequence[Case], method: str) -> str:
    if method not in cases[0]["score"]:
        return "-"
    figure = found(cases, method)
    return percent(figure.value, figure.ci95)


def _at_span(part: dict[str, Any]) -> list[Case]:
    """The cases at which the mean span is that of the comparison."""
    return [case for case in part["cases"] if _is_at_span(part, case)]


def _is_at_span(part: dict[str, Any], found: Mapping[str, Any]) -> bool:
    return round(part["span"] / found["budget"]) == found["length"]


def _points(part: dict[str, Any], method: str) -> list[Point]:
    cases = [case for case in _at_span(part) if method in case["score"]]
    return [(length, [c for c in cases if c["length"] == length]) for length in _lengths(cases)]


def _told_points(part: dict[str, Any], method: str) -> str:
    return ", ".join(str(length) for length, _ in _points(part, method))


def _grid(part: dict[str, Any], budget: float) -> list[Case]:
    return [c for c in part["cases"] if c["budget"] == budget and c["length"] in part["lengths"]]


def _floor_note(cases: Sequence[Case]) -> str:
    """Says at which lengths dense itself finds next to nothing."""
    by_length = {length: [c for c in cases if c["length"] == length] for length in _lengths(cases)}
    low = [str(length) for length, some in by_length.items() if near_floor(some)]
    return f"dense is near the floor at {', '.join(low)} tokens" if low else ""


def _lengths(cases: Sequence[Case]) -> list[int]:
    return sorted({case["length"] for case in cases})
