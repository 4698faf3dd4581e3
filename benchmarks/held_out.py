"""Ways from influence to costs, told apart by answers that the plan was not made of.

    python benchmarks/held_out.py .cache/smollm2-135m-instruct --samples 20 --work-dir .cache/moac

profiles as `moac plan` does, then draws the retrieval samples of every length into two halves,
makes a plan of one and scores it on the other: the summed influence of a sample is how much the
log-odds of its value fall, to first order. No plan is run, so that a way takes seconds, and what
first order misses is not told.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from profiled import Pairs, Profiled, profiled
from torch import Tensor

from moac.calibration import CalibrationSample
from moac.pipeline.stages import best_weighted
from moac.planning import objectives, uniform_plan
from moac.planning.objectives import ANSWERS, COUNTING, Counting, length_objectives
from moac.planning.problem import Objective, plan_losses
from moac.request import CompileRequest
from moac_runtime.package.plan import Plan


class Way(NamedTuple):
    """How answers and text count, and which share of the answers a plan is made of."""

    answers: Counting = ANSWERS
    text: Counting = COUNTING["text"]
    share: float = 1.0


TEXT = COUNTING["text"]
WAYS: Mapping[str, Way] = {
    "in use": Way(),
    "half as many answers": Way(share=0.5),
    "no samples lent": Way(replace(ANSWERS, lent=0.0)),
    "all samples lent in full": Way(replace(ANSWERS, lent=1.0)),
    "gain 0": Way(replace(ANSWERS, gain=0.0)),
    "gain 2": Way(replace(ANSWERS, gain=2.0)),
    "gain 8": Way(replace(ANSWERS, gain=8.0)),
    "gain 2, none lent": Way(replace(ANSWERS, gain=2.0, lent=0.0)),
    "text half as heavy": Way(text=replace(TEXT, weight=TEXT.weight / 2)),
    "text twice as heavy": Way(text=replace(TEXT, weight=TEXT.weight * 2)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=CompileRequest().measuring.samples)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    found = profiled(
        options.model, budget=options.budget, samples=options.samples, work_dir=options.work_dir
    )
    lengths = found.lengths
    text = text_objectives(
        found.pairs,
        uniform_plan(found.bench.layout, budget=options.budget, lengths=lengths.planned),
    )
    rows = {}
    for name, way in WAYS.items():
        with (
            patch.object(objectives, "ANSWERS", way.answers),
            patch.dict(objectives.COUNTING, {"text": way.text}),
        ):
            draws = []
            for number in range(options.draws):
                made, kept = drawn(found, random.Random(number), way.share)
                plan = best_weighted(found.bench, found.problem(made)).plan
                draws.append(
                    {
                        "made of": falls(plan, made, lengths.profiled),
                        "held out": falls(plan, kept, lengths.profiled),
                        "text": [plan_losses(plan, (table,))[0] for table in text],
                    }
                )
        rows[name] = {
            what: np.mean([d[what] for d in draws], axis=0).tolist() for what in draws[0]
        }
        told = "  ".join(
            f"{what} " + " ".join(f"{value:+.3f}" for value in values)
            for what, values in rows[name].items()
        )
        print(f"{name:36s} {told}", flush=True)
    if options.json:
        record = {
            "command": f"python benchmarks/held_out.py MODEL --budget {options.budget:g} "
            f"--samples {options.samples} --draws {options.draws}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: version(name) for name in ("moac", "torch", "transformers")},
            "identity": found.bench.checkpoint.identity,
            "lengths": list(lengths.profiled),
            "ways": {
                name: {"answers": asdict(w.answers), "text": asdict(w.text), "share": w.share}
                for name, w in WAYS.items()
            },
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def text_objectives(pairs: Pairs, uniform: Plan) -> list[Objective]:
    """What running text loses to first order, in units of `uniform`'s; one for each length."""
    text = [(sample, table) for sample, table in pairs if sample.domain == "text"]
    return length_objectives([s for s, _ in text], [t for _, t in text], uniform)


def drawn(found: Profiled, rng: random.Random, share: float) -> tuple[Pairs, Pairs]:
    """Halves of the retrieval samples, alike in length and in what they were profiled around.

    Of the first only this share is kept; it holds every sample of the other domains too.
    """
    groups: dict[tuple[int, bool], list[tuple[CalibrationSample, Tensor]]] = {}
    made: list[tuple[CalibrationSample, Tensor]] = []
    kept: list[tuple[CalibrationSample, Tensor]] = []
    for number, (sample, table) in enumerate(found.pairs):
        if sample.domain == "retrieval":
            key = (sample.length, number < found.around_dense)
            groups.setdefault(key, []).append((sample, table))
        else:
            made.append((sample, table))
    for group in groups.values():
        rng.shuffle(group)
        half = group[::2]
        made += half[: max(1, round(share * len(half)))]
        kept += group[1::2]
    return made, kept


def falls(plan: Plan, pairs: Pairs, lengths: Sequence[int]) -> list[float]:
    """How far a value's log-odds fall under `plan`, to first order, on mean at each length."""
    return [
        float(
            np.mean(
                [
                    plan_losses(plan, (Objective("sample", n, table.double().numpy()),))[0]
                    for sample, table in pairs
                    if sample.domain == "retrieval" and sample.length == n
                ]
            )
        )
        for n in lengths
    ]


if __name__ == "__main__":
    main()
