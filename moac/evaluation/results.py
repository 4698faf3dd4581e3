"""What an evaluation found: figures with their intervals, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from moac.evaluation.intervals import (
    Interval,
    mean_interval,
    share_interval,
    stratified_interval,
)
from moac.evaluation.text import KINDS
from moac.evaluation.wordings import SEEN, UNSEEN, WORDINGS
from moac.show.summary import table

EXACT_MATCH, NLL = "exact_match", "nll"
DEPTH_BINS = 5

INTERVALS = {
    EXACT_MATCH: "Wilson, 95 %; conservative where a score is a recall between 0 and 1",
    NLL: "Student, 95 %; over cases, or windows that do not overlap; of kinds of text together "
    "Welch, over the windows within a kind",
    "differences": "Student, 95 %; over the differences of the same cases",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case under one plan: `score` 0 to 1, `nll` in nats a token; None where not asked.

    `part`: the wording of a case or the kind of a text, where figures are told apart by it.
    """

    score: float | None
    nll: float
    depth: float | None = None
    part: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One figure. `ci95` is None for the mean of a single case.

    `depth`: the middle of the fifth of the haystack it is for; None for all depths together.
    `part`: the wording or the kind of text it is for; None where there is none, or for all kinds.
    """

    task: str
    length: int
    method: str
    metric: str
    value: float
    ci95: Interval | None
    n: int
    depth: float | None = None
    part: str | None = None

    def to_json(self) -> dict[str, Any]:
        """`{"task", "length", "method", "metric", "value", "ci95", "n"}`.

        And `depth`, and `wording` or `text`, where it is for one.
        """
        found: dict[str, Any] = {
            "task": self.task,
            "length": self.length,
            "method": self.method,
            "metric": self.metric,
            "value": self.value,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "n": self.n,
            **_part_json(self.part),
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
    part: str | None = None

    def to_json(self) -> dict[str, Any]:
        """`{"task", "length", "than", "metric", "value", "ci95", "n"}`, `wording` or `text`."""
        found = {name: getattr(self, name) for name in ("task", "length", "than", "metric")}
        ci95 = None if self.ci95 is None else list(self.ci95)
        return {
            **found,
            "value": self.value,
            "ci95": ci95,
            "n": self.n,
            **_part_json(self.part),
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`results`, the plan's `differences` to the others, and the `record` of how they came about.

    `outcomes[task, length][method]`: every case, in the same order for every method.
    `density[method][length]`: KV tokens held over those of dense; `byte_share` of bytes, which are
    others where plans have widths.
    """

    results: tuple[Result, ...]
    differences: tuple[Difference, ...]
    outcomes: Mapping[tuple[str, int], Mapping[str, Sequence[Outcome]]]
    density: Mapping[str, Mapping[int, float]]
    record: Mapping[str, Any]
    byte_share: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, Mapping[str, Mapping[int, float]]]:
        """By its name, each share that is told: `density`, and `byte_share` where it differs."""
        same = not self.byte_share or self.byte_share == self.density
        return {"density": self.density} | ({} if same else {"byte_share": self.byte_share})

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "results": [result.to_json() for result in self.results],
            "differences": [difference.to_json() for difference in self.differences],
            **{
                name: {
                    method: {str(length): value for length, value in row.items()}
                    for method, row in share.items()
                }
                for name, share in self.shares.items()
            },
            "cases": [
                case
                for (task, length), by_method in self.outcomes.items()
                for case in _cases_json(task, length, by_method)
            ],
            "intervals": INTERVALS,
            **self.record,
        }


def _cases_json(
    task: str, length: int, by_method: Mapping[str, Sequence[Outcome]]
) -> Iterable[dict[str, Any]]:
    """What every method made of each case: `score` and `nll` by method."""
    for outcomes in zip(*by_method.values(), strict=True):
        told = dict(zip(by_method, outcomes, strict=True))
        asked = outcomes[0]
        found: dict[str, Any] = {"task": task, "length": length, **_part_json(asked.part)}
        if asked.depth is not None:
            found["depth"] = asked.depth
        if asked.score is not None:
            found["score"] = {method: outcome.score for method, outcome in told.items()}
        yield {**found, "nll": {method: outcome.nll for method, outcome in told.items()}}


def _part_json(part: str | None) -> dict[str, str]:
    if part is None:
        return {}
    return {"wording" if part in WORDINGS else "text": part}


def summarise(
    task: str, length: int, method: str, outcomes: Sequence[Outcome]
) -> Iterable[Result]:
    """Exact match and NLL by wording or kind of text, each also by depth where cases have one.

    Kinds of text come together first; wordings never do, and the unseen one leads.
    """
    parts = _parts(outcomes)
    if _are_texts(parts):
        losses = [[outcome.nll for outcome in found] for found in parts.values()]
        value, interval = fmean(map(fmean, losses)), stratified_interval(losses)
        yield Result(task, length, method, NLL, value, interval, len(outcomes))
    for part, found in parts.items():
        yield from _part_figures(task, length, method, found, part)


def _parts(outcomes: Sequence[Outcome]) -> dict[str | None, list[Outcome]]:
    """The outcomes by wording or kind of text, in the order in which these are shown."""
    order = [None, *WORDINGS, *KINDS]
    found: dict[str | None, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: order.index(outcome.part)):
        found.setdefault(outcome.part, []).append(outcome)
    return found


def _are_texts(parts: Mapping[str | None, object]) -> bool:
    """Whether these are several kinds of text, whose mean is a figure too."""
    return len(parts) > 1 and set(parts) <= set(KINDS)


def _part_figures(
    task: str, length: int, method: str, outcomes: Sequence[Outcome], part: str | None
) -> Iterable[Result]:
    yield from _figures(task, length, method, outcomes, None, part)
    bins: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.depth is not None:
            place = min(int(outcome.depth * DEPTH_BINS), DEPTH_BINS - 1)
            bins.setdefault(place, []).append(outcome)
    for place in sorted(bins):
        yield from _figures(task, length, method, bins[place], (place + 0.5) / DEPTH_BINS, part)


def _figures(
    task: str,
    length: int,
    method: str,
    outcomes: Sequence[Outcome],
    depth: float | None,
    part: str | None,
) -> Iterable[Result]:
    n = len(outcomes)
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    losses = [outcome.nll for outcome in outcomes]
    if scores:
        interval = share_interval(scores)
        yield Result(task, length, method, EXACT_MATCH, fmean(scores), interval, n, depth, part)
    spread = mean_interval(losses)
    yield Result(task, length, method, NLL, fmean(losses), spread, n, depth, part)


def compare(
    task: str, length: int, outcomes: Mapping[str, Sequence[Outcome]]
) -> Iterable[Difference]:
    """The first of the methods of `outcomes` beside every other; their cases are the same.

    Told apart and put together as `summarise` does.
    """
    (_, own), *others = outcomes.items()
    for than, theirs in others:
        pairs = zip(_parts(own).items(), _parts(theirs).values(), strict=True)
        less = {
            part: [_less(one, other) for one, other in zip(ours, found, strict=True)]
            for (part, ours), found in pairs
        }
        if _are_texts(less):
            losses = [[nll for _, nll in found] for found in less.values()]
            value, interval = fmean(map(fmean, losses)), stratified_interval(losses)
            yield Difference(task, length, than, NLL, value, interval, len(own))
        for part, found in less.items():
            yield from _differences(task, length, than, found, part)


def _less(one: Outcome, other: Outcome) -> tuple[float | None, float]:
    """How much more the score and the NLL of `one` are than those of `other`."""
    nll = one.nll - other.nll
    if one.score is None or other.score is None:
        return None, nll
    return one.score - other.score, nll


def _differences(
    task: str,
    length: int,
    than: str,
    less: Sequence[tuple[float | None, float]],
    part: str | None,
) -> Iterable[Difference]:
    scores = [score for score, _ in less if score is not None]
    losses = [nll for _, nll in less]
    for metric, found in ((EXACT_MATCH, scores), (NLL, losses)):
        if found:
            value, interval = fmean(found), mean_interval(found)
            yield Difference(task, length, than, metric, value, interval, len(found), part)


def evaluation_text(found: Evaluation) -> str:
    """One row for each task, length and metric, one column for each method; then by depth."""
    methods = list(found.density)
    lengths = list(found.density[methods[0]])
    parts = [
        table(
            ["bytes" if name == "byte_share" else name, "length", *methods],
            [["", n, *(f"{share[m][n]:.3f}" for m in methods)] for n in lengths],
        )
        for name, share in found.shares.items()
    ]
    parts.append(_figure_table(found.results, methods))
    if found.differences:
        parts.append(_difference_table(found.differences, methods))
    deep = [r for r in found.results if r.depth is not None and r.metric == EXACT_MATCH]
    if deep:
        parts.append(_depth_table(deep, methods))
    note = "95 % intervals: exact match Wilson, NLL Student; NLL in nats a token"
    shown = {result.part for result in found.results}
    if shown & set(WORDINGS):
        parts.append(f"{UNSEEN}: in words that calibration never uses; {SEEN}: in calibration's")
    return "\n\n".join([*parts, f"{note}; run by {found.record['machine']['runs']}"])


def _named(found: Result | Difference) -> str:
    """The task, and which of its wordings or kinds of text."""
    return found.task if found.part is None else f"{found.task} ({found.part})"


def _figure_table(results: Sequence[Result], methods: Sequence[str]) -> str:
    rows: dict[tuple[str, int, str], dict[str, Result]] = {}
    for result in results:
        if result.depth is None:
            key = (_named(result), result.length, result.metric)
            rows.setdefault(key, {})[result.method] = result
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
        key = (_named(difference), difference.length, difference.metric)
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
        key = (_named(result), result.length, result.depth)
        rows.setdefault(key, {})[result.method] = result
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
