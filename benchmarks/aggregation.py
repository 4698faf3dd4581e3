"""Ways to turn influence into what a span costs, compared on held-out text and pass keys.

    python benchmarks/aggregation.py --source .cache/smollm2-135m-instruct --work-dir .cache/moac

The profile is the one a compile makes (and reuses its work folder). Each way, and each weight of
the retrieval domain under the way that compiles use, gives a plan at the same budget for the same
lengths, which then runs in the model at the shortest of them: mean loss of the dense model's own
answers to pass keys in the farther half of the context, the share of those answers it would give
token for token, and the loss of running text. Beside the loss of text stands its difference to
the uniform plan's on the same windows, with a 95 % interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moac.attention import PLANNED, attention
from moac.calibration import passkey_case, plain_text_windows
from moac.calibration.answers import DenseReader
from moac.calibration.passkey import PASSKEY_ANSWER_TOKENS
from moac.calibration.prompt import PromptFormat
from moac.checkpoint import open_checkpoint
from moac.planner import open_bench, prepare, sample_counts
from moac.planning import (
    Objective,
    Problem,
    candidate_rules,
    plan_losses,
    solve_weighted,
    uniform_plan,
)
from moac.planning.problem import Floats
from moac.request import CompileRequest
from moac.stages import calibrate, profile
from moac_runtime.plan import Plan
from moac_runtime.span import DENSE

Aggregate = Callable[[torch.Tensor], torch.Tensor]
"""Samples' influence `[samples, layers, kv_heads, spans]` to costs `[layers, kv_heads, spans]`."""

WAYS: dict[str, Aggregate] = {
    "root mean square": lambda t: t.square().mean(0).sqrt(),
    "mean of squares": lambda t: t.square().mean(0),
    "mean of |influence|": lambda t: t.abs().mean(0),
    "mean of positive part": lambda t: t.clamp_min(0).mean(0),
    "signed mean": lambda t: t.mean(0),
}
USED = "root mean square"
RETRIEVAL_WEIGHTS = (1.0, 2.0, 3.0, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True)
    parser.add_argument("--work-dir")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--windows", type=int, default=12)
    options = parser.parse_args()

    request = CompileRequest(budget=options.budget)
    checkpoint = open_checkpoint(options.source)
    lengths, layout = prepare(checkpoint, request)
    work = None if options.work_dir is None else Path(options.work_dir)
    bench = open_bench(checkpoint, layout, request, work)
    samples = calibrate(bench, sample_counts(lengths, request.samples))
    tables = profile(bench, samples)
    uniform = uniform_plan(layout, budget=options.budget, lengths=lengths.planned)
    rules = candidate_rules(
        lengths.profiled,
        block=request.block,
        min_span=request.min_span,
        extrapolated=lengths.planned[len(lengths.profiled) :],
    )

    def objective(length: int, aggregate: Aggregate, retrieval: float) -> Objective:
        parts: list[Floats] = []
        domains = list(dict.fromkeys(sample.domain for sample in samples))
        for domain in domains:
            found = [
                table.double()
                for sample, table in zip(samples, tables, strict=True)
                if (sample.length, sample.domain) == (length, domain)
            ]
            cost = aggregate(torch.stack(found)).numpy()
            cost = np.maximum.accumulate(cost[..., ::-1], axis=-1)[..., ::-1]
            unit = abs(plan_losses(uniform, [Objective("unit", length, cost)])[0])
            parts.append(cost / unit)
        weights = [retrieval if domain == "retrieval" else 1.0 for domain in domains]
        return Objective(str(length), length, np.average(parts, axis=0, weights=weights))

    def plan(aggregate: Aggregate, retrieval: float) -> Plan:
        objectives = tuple(objective(n, aggregate, retrieval) for n in lengths.profiled)
        problem = Problem(layout, rules, lengths.planned, objectives, options.budget)
        return solve_weighted(problem, {part.name: 1.0 for part in objectives}).plan

    length = lengths.profiled[0]
    cases = []
    seed = 7000
    while len(cases) < options.cases:
        depth = ((seed * 7) % 16 + 0.5) / 32
        haystack = "filler" if seed % 4 == 3 else "text"
        case = passkey_case(
            bench.tokenizer, length - PASSKEY_ANSWER_TOKENS, depth, seed, haystack=haystack
        )
        reader = DenseReader(bench.reader, PromptFormat(bench.tokenizer), capacity=length)
        reader.feed(list(case.token_ids))
        answer = reader.answer(PASSKEY_ANSWER_TOKENS)
        if case.answer in bench.tokenizer.decode(answer):
            cases.append((list(case.token_ids), answer))
        seed += 1
    windows = plain_text_windows(bench.tokenizer, length, options.windows, 3)

    @torch.inference_mode()
    def scores(tokens: list[int], answer: int, plan: Plan) -> tuple[torch.Tensor, bool]:
        with attention(bench.model, PLANNED):
            logits = bench.model(
                input_ids=torch.tensor([tokens]),
                logits_to_keep=answer + 1,
                moac_spans=plan.spans(length),
                use_cache=False,
            ).logits[0, :-1]
        target = torch.tensor(tokens[-answer:])
        loss = torch.nn.functional.cross_entropy(logits.float(), target)
        return loss, bool((logits.argmax(-1) == target).all())

    def texts(plan: Plan) -> list[float]:
        return [float(scores(list(window), length - 1, plan)[0]) for window in windows]

    of_uniform = texts(uniform)

    def show(name: str, plan: Plan) -> None:
        found = [scores(prompt + answer, len(answer), plan) for prompt, answer in cases]
        text = of_uniform if plan is uniform else texts(plan)
        apart = np.subtract(text, of_uniform)
        print(
            f"| {name} | {plan.density(length):.3f} | "
            f"{sum(float(loss) for loss, _ in found) / len(found):.3f} | "
            f"{sum(same for _, same in found)}/{len(found)} | {np.mean(text):.4f} | "
            f"{apart.mean():+.4f} ± {1.96 * apart.std(ddof=1) / len(apart) ** 0.5:.4f} |",
            flush=True,
        )

    print("| plan | density | pass key answer loss | same answer | text loss | against uniform |")
    print("|---|---|---|---|---|---|")
    show("dense", layout.uniform(DENSE))
    show("uniform", uniform)
    for retrieval in RETRIEVAL_WEIGHTS:
        show(f"{USED}, retrieval x {retrieval:g}", plan(WAYS[USED], retrieval))
    for name, aggregate in WAYS.items():
        if name != USED:
            show(name, plan(aggregate, 1.0))


if __name__ == "__main__":
    main()
