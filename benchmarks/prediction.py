"""Predicted against measured loss of random plans, by domain.

    python benchmarks/prediction.py .cache/smollm2-135m-instruct --work-dir .cache/moac --plans 60

The profile is the one a compile makes (and its work folder is reused). Plans are drawn at random
at eight densities: spans of the solver's plan, of a uniform plan, of random spans a layer and of
random spans a head, each with noise of random strength over all heads. They run in the model on
samples of the three domains made like those of a calibration, but of held-out text and another
seed; measured is the increase of loss over dense, predicted what `moac plan` goes by: the summed
influence. Intervals are 95 %, from a bootstrap over plans. Other ways to sum influence stand
beside it. What was measured is kept in the work folder, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from moac.calibration import (
    DOMAINS,
    MEASURED_KINDS,
    CalibrationSample,
    build_calibration,
    held_out_text,
)
from moac.calibration import samples as sample_making
from moac.checkpoint import open_checkpoint
from moac.pipeline.planner import open_workbench, prepare, sample_counts
from moac.pipeline.stages import Workbench, calibrate, profile, sample_loss
from moac.planning import HeadLayout, Problem, candidate_rules, solve_weighted, uniform_plan
from moac.planning.objectives import length_objectives
from moac.planning.prediction import Curve, Estimate, left_out, root
from moac.planning.problem import Floats
from moac.progress.cost import Kind
from moac.progress.progress import stage
from moac.request import CompileRequest
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule

DENSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
KINDS = ("planned", "uniform", "layer", "head")
HELD_OUT_SEED = 77
RESAMPLES = 2000
LADDER = 5

Aggregate = Callable[[Floats], Floats]
"""Samples' influence `[samples, layers, kv_heads, spans]` to costs `[layers, kv_heads, spans]`."""

FORMS: dict[str, Aggregate] = {
    "root mean square ** 1.5": lambda t: _never_rising(np.square(t).mean(0) ** 0.75),
    "root mean square": lambda t: _never_rising(np.sqrt(np.square(t).mean(0))),
    "mean of |influence|": lambda t: _never_rising(np.abs(t).mean(0)),
    "mean of positive part": lambda t: _never_rising(t.clip(min=0).mean(0)),
    "mean of squares": lambda t: _never_rising(np.square(t).mean(0)),
    "signed mean": lambda t: t.mean(0),
}
USED = "root mean square ** 1.5"


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A random plan: what its spans come from, its density, and its spans in tokens."""

    kind: str
    noise: float
    density: float
    spans: Floats
    plan: Plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--plans", type=int, default=60)
    parser.add_argument("--samples", type=int, default=4, help="held-out samples of each domain")
    parser.add_argument("--length", type=int, help="tokens [the shortest profiled length]")
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    request = CompileRequest()
    checkpoint = open_checkpoint(options.model)
    lengths, layout = prepare(checkpoint, request)
    bench = open_workbench(checkpoint, layout, request, options.work_dir)
    length = options.length or lengths.profiled[0]
    if length not in lengths.profiled:
        parser.error(f"--length must be one of {lengths.profiled}, got {length}")
    samples = calibrate(bench, sample_counts(lengths, request.measuring.samples))
    tables = profile(bench, samples)
    near = [(s, t) for s, t in zip(samples, tables, strict=True) if s.length == length]
    held_out = held_out_samples(bench, length, options.samples)
    plans = random_plans(layout, near, length, options.plans)
    measured = measure(bench, held_out, plans)
    costs = {
        domain: np.stack([t.double().numpy() for s, t in near if s.domain == domain])
        for domain in DOMAINS
    }
    report = compare(plans, costs, measured, layout.block)
    show(report, plans)
    if options.json:
        record = {
            "command": f"python benchmarks/prediction.py MODEL --plans {len(plans)} "
            f"--samples {options.samples} --length {length}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
            "versions": {name: version(name) for name in ("moac", "torch", "transformers")},
            "identity": checkpoint.identity,
            "length": length,
            "samples": options.samples,
            **report,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def held_out_samples(bench: Workbench, length: int, count: int) -> list[CalibrationSample]:
    """Calibration's own kinds of samples, made of text that calibration never reads."""
    with patch.object(sample_making, "calibration_text", held_out_text):
        return build_calibration(
            bench.reader,
            bench.tokenizer,
            samples_per_length={length: count},
            domains=MEASURED_KINDS,
            seed=HELD_OUT_SEED,
        )


def random_plans(
    layout: HeadLayout, near: Sequence[tuple[CalibrationSample, Any]], length: int, count: int
) -> list[Drawn]:
    """`count` plans, densities and kinds in turn; plan `i` is the same however many are drawn."""
    solved: dict[float, Floats] = {}
    plans = []
    for i in range(count):
        rng = np.random.default_rng(i)
        density, kind = DENSITIES[i % 8], KINDS[i // 8 % 4]
        noise = float(rng.uniform(0, 1))
        shape = (layout.num_layers, layout.num_kv_heads)
        if kind == "planned":
            if density not in solved:
                solved[density] = solved_spans(layout, near, length, density)
            base = solved[density]
        elif kind == "uniform":
            base = np.ones(shape)
        elif kind == "layer":
            base = np.exp(rng.normal(0, 1, (shape[0], 1))) * np.ones((1, shape[1]))
        else:
            base = rng.uniform(0, 1, shape)
        spans = scaled(base * np.exp(noise * rng.normal(size=shape)), density, layout, length)
        plan = layout.plan([[Rule(int(span), 0.0) for span in row] for row in spans])
        plans.append(Drawn(kind, noise, plan.density(length), spans, plan))
    return plans


def solved_spans(
    layout: HeadLayout, near: Sequence[tuple[CalibrationSample, Any]], length: int, density: float
) -> Floats:
    """The solver's spans in tokens at one length and density, `[layers, kv_heads]`."""
    uniform = uniform_plan(layout, budget=density, lengths=(length,))
    objectives = length_objectives([s for s, _ in near], [t for _, t in near], uniform)
    rules = candidate_rules([length], block=layout.block, min_span=layout.min_span)
    problem = Problem(layout, rules, (length,), tuple(objectives), density)
    plan = solve_weighted(problem, {objective.name: 1.0 for objective in objectives}).plan
    return np.array([[float(head.size) for head in row] for row in plan.spans(length)])


def scaled(weights: Floats, density: float, layout: HeadLayout, length: int) -> Floats:
    """Spans in proportion to `weights`, in blocks, with the largest density up to `density`."""

    def at(factor: float) -> Floats:
        blocks: Floats = np.round(weights * factor / layout.block) * layout.block
        return blocks.clip(layout.min_span, length)

    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).mean() <= density * length else (low, middle)
    return at(low)


def measure(
    bench: Workbench, held_out: Sequence[CalibrationSample], plans: Sequence[Drawn]
) -> dict[str, Floats]:
    """Increase of loss over dense in nats a token, `[plans, samples]` by domain."""
    work = sum(bench.costs.forward(len(sample.token_ids)) for sample in held_out)
    with stage("measure", {Kind.MEASURE: (1 + len(plans)) * work}):
        dense = [sample_loss(bench, sample, None) for sample in held_out]
        rows = []
        for drawn in plans:
            found = [sample_loss(bench, sample, drawn.plan) for sample in held_out]
            rows.append([loss - least for loss, least in zip(found, dense, strict=True)])
    table = np.array(rows)
    domains = np.array([sample.domain for sample in held_out])
    return {domain: table[:, domains == domain] for domain in DOMAINS}


def compare(
    plans: Sequence[Drawn],
    influence: dict[str, Floats],
    measured: dict[str, Floats],
    block: int,
) -> dict[str, Any]:
    """Rank correlations of every form and domain, and every plan's two losses."""
    losses = {domain: found.mean(axis=1) for domain, found in measured.items()}
    entries = np.array([drawn.spans for drawn in plans]).astype(int) // block
    scores = {
        form: {domain: _summed(aggregate(influence[domain]), entries) for domain in DOMAINS}
        for form, aggregate in FORMS.items()
    }
    scores["density alone"] = dict.fromkeys(DOMAINS, -np.array([p.density for p in plans]))
    results = [
        {"domain": domain, "predictor": form, "metric": "spearman", "n": len(plans)}
        | _correlation(found[domain], losses[domain])
        for form, found in scores.items()
        for domain in DOMAINS
    ]
    return {
        "results": results,
        "interval_coverage": {
            domain: _coverage(scores[USED][domain], losses[domain]) for domain in DOMAINS
        },
        "halves": {domain: _halves(measured[domain]) for domain in DOMAINS},
        "plans": [
            {
                "kind": drawn.kind,
                "noise": round(drawn.noise, 4),
                "density": round(drawn.density, 4),
                "score": {domain: round(scores[USED][domain][i], 4) for domain in DOMAINS},
                "increase": {domain: round(losses[domain][i], 5) for domain in DOMAINS},
            }
            for i, drawn in enumerate(plans)
        ],
    }


def _correlation(predicted: Floats, measured: Floats) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    draws = rng.integers(len(measured), size=(RESAMPLES, len(measured)))
    found = [spearman(predicted[draw], measured[draw]) for draw in draws]
    low, high = np.quantile(found, [0.025, 0.975])
    value = spearman(predicted, measured)
    return {"value": round(value, 4), "ci95": [round(float(low), 4), round(float(high), 4)]}


def spearman(a: Floats, b: Floats) -> float:
    """The correlation of ranks; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[inverse]
    return ranks


def _coverage(scores: Floats, losses: Floats) -> float:
    """How often the 90 % interval learned from five random plans holds another plan's loss."""
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        drawn = rng.permutation(len(losses))[: LADDER + 1]
        known, other = drawn[:LADDER], drawn[LADDER]
        missed = left_out(list(scores[known]), list(losses[known]))
        errors = [root(y) - root(p) for y, p in zip(losses[known], missed, strict=True)]
        curve = Curve.through(scores[known], losses[known])
        found = Estimate.of(curve.loss(float(scores[other])), errors)
        inside.append(found.low <= max(losses[other], 0.0) <= found.high)
    return round(float(np.mean(inside)), 3)


def _halves(measured: Floats) -> float:
    """The correlation of what two halves of the samples measure: what noise leaves to predict."""
    return round(spearman(measured[:, ::2].mean(1), measured[:, 1::2].mean(1)), 4)


def _summed(table: Floats, entries: Any) -> Floats:
    wide = np.broadcast_to(table, (len(entries), *table.shape))
    total: Floats = np.take_along_axis(wide, entries[..., None], axis=-1)[..., 0].sum((1, 2))
    return total


def _never_rising(table: Floats) -> Floats:
    """A wider span never counts as dearer than a narrower one."""
    return np.maximum.accumulate(table[..., ::-1], axis=-1)[..., ::-1]


def show(report: dict[str, Any], plans: Sequence[Drawn]) -> None:
    """Markdown: a row for each way to predict, Spearman with its interval for each domain."""
    print(f"Spearman of predicted and measured loss, {len(plans)} random plans\n")
    print(f"| predicted by | {' | '.join(DOMAINS)} |")
    print(f"|---|{'---|' * len(DOMAINS)}")
    for form in dict.fromkeys(row["predictor"] for row in report["results"]):
        rows = {r["domain"]: r for r in report["results"] if r["predictor"] == form}
        cells = [
            f"{rows[d]['value']:.3f} ({rows[d]['ci95'][0]:.3f} to {rows[d]['ci95'][1]:.3f})"
            for d in DOMAINS
        ]
        print(f"| {f'**{form}**' if form == USED else form} | {' | '.join(cells)} |")
    halves = " | ".join(f"{report['halves'][domain]:.3f}" for domain in DOMAINS)
    print(f"| half of the samples, by the other half | {halves} |")
    print(f"\n90 % intervals learned from {LADDER} plans hold: {report['interval_coverage']}")


if __name__ == "__main__":
    main()
