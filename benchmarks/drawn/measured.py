"""What was measured, read from `benchmarks/results/` and from the plan that the tests keep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moac_runtime.package.plan import Plan

RESULTS = Path(__file__).parents[1] / "results"
PLAN = Path(__file__).parents[2] / "tests" / "golden" / "smollm2_plan.json"
QUALITY = {
    "exact_match": ("eval-passkey-half-2026-11-22", "eval-passkey-quarter-2026-11-22"),
    "nll": (
        *("eval-nll-half-2026-11-22", "eval-nll-quarter-2026-11-22"),
        *("eval-nll-ablation-half-2026-11-22", "eval-nll-ablation-quarter-2026-11-22"),
    ),
}
TASKS = {"exact_match": "passkey", "nll": "nll"}
SPEED = "cpu-2026-11-22"


@dataclass(frozen=True, slots=True)
class Point:
    """A figure and its 95 % interval, at the share of the dense KV memory that its plan holds."""

    density: float
    value: float
    low: float
    high: float


def quality(metric: str) -> dict[int, dict[str, list[Point]]]:
    """Points by length and plan, sparsest first: pass keys ("exact_match") or text ("nll")."""
    found: dict[int, dict[str, dict[float, Point]]] = {}
    for name in QUALITY[metric]:
        document = _read(name)
        for row in _over_all_depths(document["results"], metric):
            density = document["density"][row["method"]][str(row["length"])]
            point = Point(density, row["value"], *row["ci95"])
            by_plan = found.setdefault(row["length"], {})
            # two runs that measured the same plan agree, so either may stand
            by_plan.setdefault(row["method"], {})[density] = point
    return {
        length: {plan: [points[d] for d in sorted(points)] for plan, points in by_plan.items()}
        for length, by_plan in sorted(found.items())
    }


def _over_all_depths(
    rows: Iterable[Mapping[str, Any]], metric: str
) -> Iterable[Mapping[str, Any]]:
    for row in rows:
        if (row["task"], row["metric"]) == (TASKS[metric], metric) and "depth" not in row:
            yield row


def speed(*, batch: int) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of `moac bench` at `batch` by system, shortest context first."""
    rows = [row for run in _read(SPEED)["runs"] for row in run["rows"] if row["batch"] == batch]
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["context"]):
        found.setdefault(row["system"], []).append(row)
    return found


def prediction() -> list[Mapping[str, Any]]:
    """60 plans: `score` predicted by influence, `increase` of loss measured, by kind of text."""
    plans: list[Mapping[str, Any]] = _read("prediction-2026-11-22")["plans"]
    return plans


def influence(table: str) -> npt.NDArray[np.float64]:
    """`[heads, spans]`: what each KV head is predicted to lose under a span of so many blocks."""
    with np.load(RESULTS / "smollm2-influence.npz") as tables:
        found: npt.NDArray[np.float64] = tables[table].astype(np.float64)
    return found.reshape(-1, found.shape[-1])


def plan() -> Plan:
    """The plan that one compile of SmolLM2-135M-Instruct made at half of the KV memory."""
    return Plan.from_json(json.loads(PLAN.read_text(encoding="utf-8")))


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
