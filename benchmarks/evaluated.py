"""Cases of `moac eval` under plans of one budget, numbered so that several runs can be pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pooled import Case

from moac.evaluation import EvalRequest, evaluate
from moac.evaluation.methods import OWN
from moac.evaluation.request import NLL_PARTS, RULER

DENSE = "dense"

_TOLD_ALREADY = {*NLL_PARTS, RULER}  # text's last tokens read in two ways, RULER's tasks as one


def evaluated(
    package: Path,
    model: str,
    plans: Mapping[str, Path],
    *,
    budget: float,
    lengths: Sequence[int],
    seed: int,
    work_dir: Path,
    **asked: Any,
) -> list[Case]:
    """What dense and each of `plans` (files by the names to bear) make of every case.

    `asked`: more of an `EvalRequest`. Finished cells are kept in `work_dir`.
    """
    against = (DENSE, *map(str, plans.values()))
    request = EvalRequest(lengths=tuple(lengths), seed=seed, against=against, **asked)
    found = evaluate(package, model, request=request, work_dir=work_dir / "kept-eval")
    names = {path.stem: name for name, path in plans.items()}
    cases: list[Case] = []
    places: dict[tuple[object, ...], int] = {}
    for case in found.to_json()["cases"]:
        if case["task"] in _TOLD_ALREADY:
            continue
        group = tuple(case.get(name) for name in ("task", "length", "wording", "text"))
        places[group] = places.get(group, -1) + 1
        for what in {"score", "nll"} & case.keys():
            case[what] = _renamed(case[what], names)
        cases.append({"budget": budget, "seed": seed, "place": places[group], **case})
    return cases


def _renamed(figures: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    """By the plans' names; the package's own plan, which nobody asked for, is left out."""
    return {names.get(stem, stem): value for stem, value in figures.items() if stem != OWN}
