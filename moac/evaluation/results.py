"""What an evaluation found: figures with their intervals, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from moac.evaluation.intervals import Interval, mean_interval, share_interval
from moac.summary import table

EXACT_MATCH, NLL = "exact_match", "nll"
DEPTH_BINS = 5

INTERVALS = {
    EXACT_MATCH: "Wilson, 95 %; conservative where a score is a recall between 0 and 1",
    NLL: "Student, 95 %; over cases",
    "differences": "Student, 95 %; over the differences of the same cases",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case under one plan: `score` 0 to 1, `nll` in nats a token; None where not asked."""

    score: float | None
    nll: float
    depth: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One figure. `ci95` is None for the mean of a single case.

    `depth`: the middle of the fifth of the haystack it is for; None for all depths together.
    """

    task: str
    length: int
    method: str
    metric: str
    value: float
    ci95: Interval | None
    n: int
    depth: float | None = None

    def to_json(self) -> dict[str, Any]:
        """`{"task", "length", "method", "metric", "value", "ci95", "n"}`, and `depth` if any."""
        found: dict[str, Any] = {
            "task": self.task,
            "length": self.length,
            "method": self.method,
            "metric": self.metric,
            "value": self.value,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "n": self.n,
        }
        return found if self.depth is None else {**found, "depth": self.depth}


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more a figure is under the package's plan than under another, case by case.

    `ci95` is that of the mean of the cases' differences, None for a single case.
    """

    task: str
    length: int
    than: str
    metric: str
    value: float
    ci95: Interval | None
    n: int

    def to_json(self) -> dict[str, Any]:
        """`{"task", "length", "than", "metric", "value", "ci95", "n"}`."""
        found = {name: getattr(self, name) for name in ("task", "length", "than", "metric")}
        ci95 = None if self.ci95 is None else list(self.ci95)
        return {**found, "value": self.value, "ci95": ci95, "n": self.n}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`results`, the plan's `differences` to the others, and the `record` of how they came about.

    `density[method][length]`: KV bytes held over dense KV bytes.
    """

    results: tuple[Result, ...]
    differences: tuple[Difference, ...]
    density: Mapping[str, Mapping[int, float]]
    record: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "results": [result.to_json() for result in self.results],
            "differences": [difference.to_json() for difference in self.differences],
            "density": {
                method: {str(length): value for length, value in row.items()}
                for method, row in self.density.items()
            },
            "intervals": INTERVALS,
            **self.record,
        }


def summarise(
    task: str, length: int, method: str, outcomes: Sequence[Outcome]
) -> Iterable[Result]:
    """Exact match and NLL over all outcomes, then by depth where every case has one."""
    yield from _figures(task, length, method, outcomes, None)
    bins: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.depth is not None:
            place = min(int(outcome.depth * DEPTH_BINS), DEPTH_BINS - 1)
            bins.setdefault(place, []).append(outcome)
    for place in sorted(bins):
        yield from _figures(task, length, method, bins[place], (place + 0.5) / DEPTH_BINS)


def _figures(
    task: str, length: int, method: str, outcomes: Sequence[Outcome], depth: float | None
) -> Iterable[Result]:
    n = len(outcomes)
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    losses = [outcome.nll for outcome in outcomes]
    if scores:
        interval = share_interval(scores)
        yield Result(task, length, method, EXACT_MATCH, fmean(scores), interval, n, depth)
    yield Result(task, length, method, NLL, fmean(losses), mean_interval(losses), n, depth)


def compare(
    task: str, length: int, outcomes: Mapping[str, Sequence[Outcome]]
) -> Iterable[Difference]:
    """The first of the methods of `outcomes` beside every other; their cases are the same."""
    (_, own), *others = outcomes.items()
    for than, theirs in others:
        pairs = list(zip(own, theirs, strict=True))
        scores = [
            a.score - b.score for a, b in pairs if a.score is not None and b.score is not None
        ]
        losses = [a.nll - b.nll for a, b in pairs]
        for metric, found in ((EXACT_MATCH, scores), (NLL, losses)):
            if found:
                yield Difference(
                    task, length, than, metric, fmean(found), mean_interval(found), len(found)
                )


def evaluation_text(found: Evaluation) -> str:
    """One row for each task, length and metric, one column for each method; then by depth."""
    methods = list(found.density)
    lengths = list(found.density[methods[0]])
    header = ["density", "length", *methods]
    rows = [["", n, *(f"{found.density[m][n]:.3f}" for m in methods)] for n in lengths]
    parts = [table(header, rows), _figure_table(found.results, methods)]
    if found.differences:
        parts.append(_difference_table(found.differences, methods))
    deep = [r for r in found.results if r.depth is not None and r.metric == EXACT_MATCH]
    if deep:
        parts.append(_depth_table(deep, methods))
    note = "95 % intervals: exact match Wilson, NLL Student; NLL in nats a token"
    return "\n\n".join([*parts, f"{note}; run by {found.record['machine']['runs']}"])


def _figure_table(results: Sequence[Result], methods: Sequence[str]) -> str:
    rows: dict[tuple[str, int, str], dict[str, Result]] = {}
    for result in results:
        if result.depth is None:
            rows.setdefault((result.task, result.length, result.metric), {})[result.method] = (
                result
            )
    return table(
        ["task", "length", "metric", "n", *methods],
        [
            [task, length, metric, row[methods[0]].n, *(_cell(row[m]) for m in methods)]
            for (task, length, metric), row in rows.items()
        ],
    )


def _difference_table(differences: Sequence[Difference], methods: Sequence[str]) -> str:
    own, *others = methods
    rows: dict[tuple[str, int, str], dict[str, Difference]] = {}
    for difference in differences:
        key = (difference.task, difference.length, difference.metric)
        rows.setdefault(key, {})[difference.than] = difference
    return table(
        [f"{own} less another", "length", "metric", "n", *others],
        [
            [task, length, metric, row[others[0]].n, *(_cell(row[m], signed=True) for m in others)]
            for (task, length, metric), row in rows.items()
        ],
    )


def _depth_table(results: Sequence[Result], methods: Sequence[str]) -> str:
    rows: dict[tuple[str, int, float | None], dict[str, Result]] = {}
    for result in results:
        rows.setdefault((result.task, result.length, result.depth), {})[result.method] = result
    return table(
        ["exact match by depth", "length", "depth", "n", *methods],
        [
            [task, length, depth, row[methods[0]].n, *(_cell(row[m]) for m in methods)]
            for (task, length, depth), row in rows.items()
        ],
    )


def _cell(result: Result | Difference, *, signed: bool = False) -> str:
    digits = 2 if result.metric == EXACT_MATCH else 4 if signed else 3
    form = f"{'+' if signed else ''}.{digits}f"
    shown = f"{result.value:{form}}"
    if result.ci95 is None:
        return shown
    low, high = result.ci95
    return f"{shown} [{low:{form}}, {high:{form}}]"
