"""A measured local search after the solver: does swapping spans between heads find better plans?

    python benchmarks/local_search.py out/ --source .cache/smollm2-135m-instruct \
        --work-dir .cache/moac --length 1024 --steps 60

Starts from the package's plan at one length. A step gives some tokens of one KV head's span to
another head, and stays if the loss measured on the compile's own samples falls: forward passes
alone, no gradients. The loss is that of retrieval and text as the objective weighs them, each in
units of what the uniform plan loses in it. What the search found is then judged on
pass keys and running text that no sample is made of.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from judging import show

from moac.calibration import CalibrationSample
from moac.checkpoint import open_checkpoint
from moac.pipeline.planner import open_workbench, prepare, sample_counts
from moac.pipeline.stages import Workbench, calibrate, sample_loss
from moac.planning import HeadLayout, matching_uniform
from moac.planning.objectives import ANSWERS, COUNTING
from moac.progress.cost import Kind
from moac.progress.progress import stage
from moac.request import CompileRequest
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule

MOVED_BLOCKS = (2, 4)

Spans = list[list[int]]


class Losses:
    """What a plan loses on samples, dense at 0 and the uniform plan at 1."""

    def __init__(
        self, bench: Workbench, samples: Sequence[CalibrationSample], uniform: Plan
    ) -> None:
        self._bench, self._samples = bench, samples
        self._dense = self._by_domain(None)
        self._uniform = self._by_domain(uniform)
        density = uniform.density(samples[0].length)
        self.work = sum(bench.costs.forward(len(s.token_ids), density) for s in samples)

    def __call__(self, plan: Plan) -> float:
        found = self._by_domain(plan)
        counting = {domain: COUNTING.get(domain, ANSWERS).weight for domain in found}
        shares = [
            weight * (found[d] - self._dense[d]) / (self._uniform[d] - self._dense[d])
            for d, weight in counting.items()
        ]
        return sum(shares) / sum(counting.values())

    def _by_domain(self, plan: Plan | None) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for sample in self._samples:
            found.setdefault(sample.domain, []).append(sample_loss(self._bench, sample, plan))
        return {domain: float(np.mean(losses)) for domain, losses in found.items()}


def search(
    layout: HeadLayout, spans: Spans, length: int, losses: Losses, steps: int
) -> tuple[Spans, list[float]]:
    """The best spans met, and the loss after every step."""
    rng = random.Random(0)
    best = losses(plan_of(layout, spans))
    course = [best]
    with stage("search", {Kind.MEASURE: steps * losses.work}):
        for _ in range(steps):
            proposed = exchanged(layout, spans, length, rng)
            loss = losses(plan_of(layout, proposed))
            if loss < best:
                best, spans = loss, proposed
            course.append(best)
    return spans, course


def exchanged(layout: HeadLayout, spans: Spans, length: int, rng: random.Random) -> Spans:
    """Some blocks of one head's span given to another; both stay between minimum and dense."""
    heads = [(i, j) for i in range(layout.num_layers) for j in range(layout.num_kv_heads)]
    while True:
        (i, j), (k, m) = rng.sample(heads, 2)
        tokens = rng.choice(MOVED_BLOCKS) * layout.block
        if spans[i][j] + tokens <= length and spans[k][m] - tokens >= layout.min_span:
            moved = [list(layer) for layer in spans]
            moved[i][j] += tokens
            moved[k][m] -= tokens
            return moved


def plan_of(layout: HeadLayout, spans: Spans) -> Plan:
    return layout.plan([[Rule(size, 0.0) for size in layer] for layer in spans])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--source", required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cases", type=int, default=32)
    parser.add_argument("--texts", type=int, default=16)
    options = parser.parse_args()

    artifact, checkpoint = open_artifact(options.package), open_checkpoint(options.source)
    request = CompileRequest(budget=artifact.plan.density(options.length))
    lengths, layout = prepare(checkpoint, request)
    bench = open_workbench(checkpoint, layout, request, options.work_dir)
    made = calibrate(bench, sample_counts(lengths, request.measuring.samples))
    samples = [s for s in made if s.length == options.length and s.domain != "documents"]
    uniform = matching_uniform(artifact.plan, lengths=(options.length,))
    before = [[head.size for head in layer] for layer in artifact.plan.spans(options.length)]
    after, course = search(
        layout, before, options.length, Losses(bench, samples, uniform), options.steps
    )
    kept = sum(a > b for a, b in pairwise(course))
    print(
        f"{options.steps} swaps measured on {len(samples)} samples of {options.length} tokens, "
        f"{kept} kept: loss {course[0]:.4f} to {course[-1]:.4f} of the uniform plan's\n"
    )
    plans = {
        "uniform": uniform,
        "the solver's": plan_of(layout, before),
        "after the search": plan_of(layout, after),
    }
    sizes = {"length": options.length, "cases": options.cases, "texts": options.texts}
    show(artifact, checkpoint, plans, **sizes)


if __name__ == "__main__":
    main()
