"""What the page tells, drawn from what `inspect_artifact` found; what was not recorded is None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from moac.origin import told_plan
from moac.show.inspection import chosen_plan
from moac.show.report import charts
from moac.show.report.heat_map import heat_map, width_map
from moac.show.report.quality import Quality
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.plan import Plan

MEAN = "mean"

_KINDS = {
    "retrieval": "facts hidden in a long text and asked for at its end",
    "documents": "quotes and summaries of one of several documents",
    "text": "the continuation of running text",
}
_CURVE_STEPS = 128
_STAGES = (
    "load",
    "rehearse",
    "calibrate",
    "profile",
    "predict",
    "refine",
    "optimise",
    "validate",
    "emit",
    "verify",
)


@dataclass(frozen=True, slots=True)
class Losses:
    """Measured losses in nats a token, `[kind of text]` and their mean, of every plan compared."""

    length: int
    domains: tuple[str, ...]
    plans: Mapping[str, Mapping[str, float]]
    chosen: str

    @classmethod
    def of(cls, record: Mapping[str, Any], chosen: str) -> Losses | None:
        """None where nothing was measured."""
        rows = record.get("measured_loss")
        if not rows or chosen not in {row["plan"] for row in rows}:
            return None
        return cls(
            length=record["unseen"],
            domains=tuple(rows[0]["losses"]),
            plans={row["plan"]: {**row["losses"], MEAN: row["loss"]} for row in rows},
            chosen=chosen,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The kinds of text, and the mean."""
        return (*self.domains, MEAN)

    @property
    def over_dense(self) -> float:
        """The chosen plan's mean loss above the dense model's."""
        return self.plans[self.chosen][MEAN] - self.plans["dense"][MEAN]

    @property
    def uniform_over_dense(self) -> float | None:
        """The same of equal spans for all heads."""
        uniform = self.plans.get("uniform")
        return None if uniform is None else uniform[MEAN] - self.plans["dense"][MEAN]

    @property
    def compared(self) -> dict[str, Mapping[str, float]]:
        """The plans of the front."""
        return {n: loss for n, loss in self.plans.items() if n not in ("dense", "uniform")}

    @property
    def chosen_is_best(self) -> bool:
        """Whether no compared plan has a lower mean loss."""
        least = min(losses[MEAN] for losses in self.compared.values())
        return self.plans[self.chosen][MEAN] <= least

    def chart(self) -> Markup:
        """Loss above dense, a row for each kind of text."""
        others = {name: loss for name, loss in self.compared.items() if name != self.chosen}
        return charts.loss_chart(
            self.columns,
            self.plans["dense"],
            self.plans[self.chosen],
            self.plans.get("uniform"),
            others,
        )


@dataclass(frozen=True, slots=True)
class Story:
    """One package. `found`: as `inspect_artifact` gives it. `held`: the share of the dense KV
    cache's bytes that is held at lengths all along the way to the longest planned one.
    """

    found: Mapping[str, Any]
    held: tuple[tuple[int, float], ...]
    losses: Losses | None
    quality: Quality | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> Story:
        """Read what the page needs out of `found`, and of an `evaluation` (`moac eval --json`)."""
        plan = Plan.from_json({**found, "windows": found["model"]["windows"]})
        record = found["planning"]
        chosen = chosen_plan(record)
        lengths = _curve_lengths(found["lengths"], plan.block)
        kv = KvShape(found["model"]["head_dim"], DTYPE_BYTES[found["dtype"]])
        held = tuple((n, plan.byte_share(n, kv)) for n in lengths)
        quality = None if evaluation is None else Quality.of(evaluation)
        return cls(found, held, Losses.of(record, chosen), quality)

    @property
    def name(self) -> str:
        """The model's own name: the last part of where it came from."""
        source = str(self.found["provenance"]["source"])
        return source.rstrip("/").rsplit("/", 1)[-1] or source

    @property
    def taken(self) -> str | None:
        """Where the plan was taken from, None where this package's own compile found it."""
        return told_plan(self.found["provenance"])

    @property
    def longest(self) -> int:
        """The longest planned length, in tokens."""
        return int(self.found["lengths"][-1])

    @property
    def kinds(self) -> Mapping[str, str]:
        """What the kinds of text are that every compile measures."""
        return _KINDS

    @property
    def front(self) -> list[dict[str, Any]]:
        """The plans that were compared, as recorded."""
        return list(self.found["planning"].get("front", ()))

    @property
    def objectives(self) -> list[str]:
        """What losses were predicted for, in order."""
        return list(self.front[0]["losses"]) if self.front else []

    @property
    def checks(self) -> list[dict[str, Any]]:
        """The checks that the package went through; `relation` between value and limit."""
        return [
            {**check, "relation": "at most" if at_most(check) else "more than"}
            for check in self.found["verification"].get("checks", ())
        ]

    @property
    def stages(self) -> list[tuple[str, float, int | None]]:
        """Name, seconds, and the most bytes held by its end, of each stage as they came.

        For a package whose `build.json` is there.
        """
        seconds, peaks = (self.found["build"][n] for n in ("seconds", "peak_memory_by_stage"))
        names = [*(n for n in _STAGES if n in seconds), *sorted(seconds.keys() - set(_STAGES))]
        return [(name, seconds[name], peaks.get(name)) for name in names]

    def heat_maps(self) -> list[tuple[int, float, Markup]]:
        """Length, density and picture, for each planned length."""
        windows = self.found["model"]["windows"]
        return [
            (n, self.found["density"][str(n)], heat_map(self.found["spans"][str(n)], n, windows))
            for n in self.found["lengths"]
        ]

    def width_map(self) -> Markup | None:
        """The widths of keys and values; None where all are of the package's dtype."""
        widths = self.found["widths"]
        if all(bits is None for layer in widths for bits in layer):
            return None
        return width_map(widths, self.found["dtype"])

    def density_chart(self) -> Markup:
        """The share of bytes at every length up to the longest planned one."""
        planned = [(n, self.found["byte_share"][str(n)]) for n in self.found["lengths"]]
        return charts.density_chart(self.held, planned, self.found["budget"])

    def bytes_chart(self) -> Markup:
        """KV bytes of one sequence, held and dense."""
        token = self.found["kv_bytes"][str(self.longest)]["dense"] / self.longest
        held = [(n, share * n * token) for n, share in self.held]
        planned = [(n, self.found["kv_bytes"][str(n)]["held"]) for n in self.found["lengths"]]
        return charts.bytes_chart(held, planned, partial(_times, token))

    def front_chart(self) -> Markup | None:
        """Predicted losses of the front; None where there is nothing to weigh up."""
        if len(self.front) < 2 or len(self.objectives) < 2:
            return None
        plans = {p["plan"]: list(p["losses"].values()) for p in self.front}
        names = [f"{int(o):,} tokens" if o.isdecimal() else o for o in self.objectives]
        return charts.front_chart(names, plans, self._chosen)

    @property
    def predicted(self) -> dict[str, Any] | None:
        """The predicted loss of the package's plan, None where there is no record of how.

        The first packages held a sum of influences under that name.
        """
        record = self.found["planning"]
        found: dict[str, Any] | None = record.get("predicted_loss")
        return found if "prediction" in record else None

    def prediction_chart(self) -> Markup | None:
        """Predicted against measured loss; None where one of them is not known."""
        if self.losses is None or self.predicted is None:
            return None
        low, high = self.predicted["interval"]
        return charts.prediction_chart(
            self.predictions(), self.ladder(), self._chosen, (low, high)
        )

    def ladder(self) -> dict[str, tuple[float, float]]:
        """Predicted and measured loss above dense of the plans that the curves go through."""
        rungs = self.found["planning"]["prediction"]["ladder"]
        return {rung["plan"]: (rung["predicted"], rung["measured"]) for rung in rungs}

    def predictions(self) -> dict[str, tuple[float, float]]:
        """The same of each plan of the front, which the prediction did not learn from."""
        if self.losses is None or self.predicted is None:
            return {}
        dense = self.losses.plans["dense"][MEAN]
        return {
            point["plan"]: (point["loss"], self.losses.plans[point["plan"]][MEAN] - dense)
            for point in self.found["planning"]["prediction"]["front"]
            if point["plan"] in self.losses.plans
        }

    def pairs_in_order(self) -> tuple[int, int]:
        """Of all pairs of plans, how many are ranked alike by prediction and measurement."""
        found = list(self.predictions().values())
        pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
        return sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs), len(pairs)

    @property
    def _chosen(self) -> str:
        return chosen_plan(self.found["planning"])


def _curve_lengths(planned: Sequence[int], block: int) -> list[int]:
    """Lengths on both sides of the steps that rounding to blocks makes, and the planned ones."""
    apart = block * max(1, -(-planned[-1] // (_CURVE_STEPS * block)))
    corners = {n + side for n in range(0, planned[-1], apart) for side in (0, 1)}
    return sorted((corners | {*planned}) - {0})


def at_most(check: Mapping[str, Any]) -> bool:
    """Whether the check demands a value of at most its limit; else it demands more than it."""
    return bool((check["value"] <= check["limit"]) == check["ok"])


def _times(factor: float, count: int) -> float:
    return factor * count
