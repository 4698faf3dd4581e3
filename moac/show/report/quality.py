"""What `moac eval` measured of a package, told in its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moac.show.report import wording
from moac.show.report.quality_charts import Figure, Series, quality_chart
from moac_runtime.errors import UsageError
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.json_text import read_json_file
from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.plan import Plan

OWN = "moac"
EXACT_MATCH, NLL = "exact_match", "nll"
METHODS = {
    OWN: "this package",
    "dense": "the original model",
    "uniform": "uniform: the same span for every head",
    "layerwise": "layerwise: one rule a layer",
}

_METRICS = {EXACT_MATCH: "exact match", NLL: "loss, nats a token"}
WORDINGS = ("unseen", "seen")
_PARTS = ("ruler_", "nll_")  # a mean or a whole of theirs has a chart already


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One figure of every method; `depth` is None for all depths together.

    `part`: the wording of the cases or the kind of text it is for, where it is for one.
    """

    task: str
    part: str | None
    length: int
    metric: str
    depth: float | None
    n: int
    figures: Mapping[str, Figure]

    @property
    def label(self) -> str:
        """The task, and which of its wordings or kinds of text."""
        return self.task if self.part is None else f"{self.task} ({self.part})"

    @property
    def named(self) -> str:
        """The metric in words."""
        return _METRICS[self.metric]

    @property
    def middle(self) -> str:
        """The depth it is for, as a share of the text."""
        return "" if self.depth is None else wording.percent(self.depth)

    def cells(self, methods: Sequence[str]) -> list[str]:
        """Value and interval of each of `methods`, as the table shows them."""
        return [_cell(self.figures[method], self.metric) for method in methods]


_Key = tuple[str, str | None, int, str, float | None]


@dataclass(frozen=True, slots=True)
class Quality:
    """`evaluation`: what `moac eval --json` printed. `rows` in the order of its results."""

    evaluation: Mapping[str, Any]
    rows: tuple[FigureRow, ...]

    @classmethod
    def of(cls, evaluation: Mapping[str, Any]) -> Quality:
        """Gather the methods' figures of each task, length, metric and depth."""
        rows: dict[_Key, dict[str, Figure]] = {}
        counts: dict[_Key, int] = {}
        for found in evaluation["results"]:
            part = found.get("wording", found.get("text"))
            key = (found["task"], part, found["length"], found["metric"], found.get("depth"))
            low, high = found["ci95"] or (None, None)
            rows.setdefault(key, {})[found["method"]] = Figure(found["value"], low, high)
            counts[key] = found["n"]
        if any(figures.keys() != evaluation["density"].keys() for figures in rows.values()):
            raise ValueError("every method must have every figure")
        made = [FigureRow(*key, counts[key], figures) for key, figures in rows.items()]
        return cls(evaluation, tuple(made))

    @property
    def methods(self) -> list[str]:
        """The plans compared, this package's first."""
        return [name for name in METHODS if name in self.evaluation["density"]]

    @property
    def named(self) -> Mapping[str, str]:
        """What the methods are, in words."""
        return METHODS

    @property
    def whole(self) -> list[FigureRow]:
        """The figures over all depths."""
        return [row for row in self.rows if row.depth is None]

    @property
    def by_depth(self) -> list[FigureRow]:
        """The shares found where every case has a depth."""
        return [r for r in self.rows if r.depth is not None and r.metric == EXACT_MATCH]

    def densities(self) -> list[tuple[int, list[str]]]:
        """Of each length, the share of the dense KV cache that each method holds."""
        held = self.evaluation["density"]
        return [
            (int(n), [wording.percent(held[method][n]) for method in self.methods])
            for n in held[OWN]
        ]

    @property
    def told_apart(self) -> bool:
        """Whether cases in calibration's own words are told apart from others."""
        return any(row.part in WORDINGS for row in self.rows)

    def length_charts(self) -> list[tuple[str, str, Markup]]:
        """Task, metric and picture by length: shares found, and loss where nothing is found.

        The tasks of RULER stand in the table alone, their mean has a chart; so do parts of a text.
        """
        tasks = dict.fromkeys(r.label for r in self.whole if not r.task.startswith(_PARTS))
        made = []
        for task in tasks:
            rows = [row for row in self.whole if row.label == task]
            metric = EXACT_MATCH if any(r.metric == EXACT_MATCH for r in rows) else NLL
            rows = [row for row in rows if row.metric == metric]
            places = [wording.tokens(row.length) for row in rows]
            chart = self._chart(rows, places, f"{task} by length", "length in tokens")
            made.append((task, _METRICS[metric], chart))
        return made

    def depth_charts(self) -> list[tuple[str, int, Markup]]:
        """Task, length and picture by depth."""
        rows: dict[tuple[str, int], list[FigureRow]] = {}
        for row in self.by_depth:
            if not row.task.startswith(_PARTS):
                rows.setdefault((row.label, row.length), []).append(row)
        return [
            (task, length, self._depth_chart(found, f"{task} by depth at {length} tokens"))
            for (task, length), found in rows.items()
        ]

    def _depth_chart(self, rows: Sequence[FigureRow], label: str) -> Markup:
        places = [wording.percent(row.depth or 0.0) for row in rows]
        return self._chart(rows, places, label, "depth in the text, 0 % is its beginning")

    def _chart(
        self, rows: Sequence[FigureRow], places: Sequence[str], label: str, across: str
    ) -> Markup:
        series: Series = {method: [r.figures[method] for r in rows] for method in self.methods}
        share = rows[0].metric == EXACT_MATCH
        return quality_chart(series, places, label=label, across=across, share=share)


def read_evaluation(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """What `moac eval --json` wrote to `path`, of the package that `inspect` found.

    Raises UsageError for another file, and for an evaluation of another package.
    """
    try:
        evaluation = read_json_file(path)
        measured = {
            kind: {int(n): share for n, share in evaluation[kind][OWN].items()}
            for kind in ("density", *({"byte_share"} & evaluation.keys()))
        }
        source = evaluation["package"]["identity"]
        Quality.of(evaluation)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); name a results file"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"{path} is not what `moac eval PACKAGE --json` prints; give a file with that"
        ) from None
    plan = Plan.from_json({**found, "windows": found["model"]["windows"]})
    kv = KvShape(found["model"]["head_dim"], DTYPE_BYTES[found["dtype"]])
    same = all(
        abs(plan.density(n) - share) < 1e-9 for n, share in measured["density"].items()
    ) and all(
        abs(plan.byte_share(n, kv) - share) < 1e-9
        for n, share in measured.get("byte_share", measured["density"]).items()
    )
    if source != found["provenance"].get("identity") or not same:
        raise UsageError(
            f"{path} is an evaluation of another package (its model or its plan differs from "
            "this one's); evaluate this package, or name the one that was evaluated"
        )
    return dict(evaluation)


def _cell(figure: Figure, metric: str) -> str:
    digits = 2 if metric == EXACT_MATCH else 3
    shown = f"{figure.value:.{digits}f}"
    if figure.low is None or figure.high is None:
        return shown
    return f"{shown} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"
