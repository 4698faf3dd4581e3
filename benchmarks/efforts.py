"""What the efforts of `moac plan` find: quick, standard and thorough at half and a quarter.

    python benchmarks/efforts.py .cache/smollm2-135m-instruct --work-dir .cache/efforts

makes a plan of each effort at each budget, packages the first budget's best one, and evaluates
dense, uniform and every effort's plan on its weights: pass keys in wordings that calibration
never uses, apart from them in calibration's own, and running text. Each effort has a work folder
of its own below --work-dir, so that the seconds of its first plan are what it takes alone.

The last effort named is what the others are measured by: of what it finds beyond uniform, 0.85
is to be found by quick too, over all budgets, lengths and seeds together. Everything is kept, and
an interrupted run goes on with the same command; --table-only writes the page again from --out.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from asked import check_lengths, ended, numbers, parsed, parser, shares, words
from by_effort.page import criterion, page
from evaluated import evaluated
from made import UNIFORM, made_package, made_plan, made_uniform, plan_path
from pooled import Case
from told import origin, read_results, write

from moac.checkpoint import open_checkpoint
from moac.effort import EFFORTS
from moac.evaluation import EvalRequest
from moac.evaluation.wordings import SEEN, UNSEEN
from moac.request import CompileRequest
from moac_runtime.errors import UsageError
from moac_runtime.package.artifact import open_artifact


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; its exit code is that of a moac command."""
    return ended(_main, argv)


def _main(arguments: list[str]) -> int:
    options = _options(arguments)
    if options.table_only:
        result = read_results(options.out, "efforts")
    else:
        _check(options)
        result = _result(options, arguments)
        result["plans"] = _plans(options)
        for cases in _evaluations(options, _packaged(options)):
            result["cases"] += cases
            write(options.out, result, page(result))  # what there is, whatever comes
    text = page(result)
    result["criterion"] = [kept.to_json() for kept in criterion(result)]
    write(options.out, result, text)
    print(text, end="")
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    made = parser("efforts", __doc__)
    add = made.add_argument
    add("--efforts", type=words, default=tuple(EFFORTS), metavar="NAME,...",
        help=f"the last is the yardstick ({','.join(EFFORTS)})")  # fmt: skip
    add("--budgets", type=shares, default=(0.5, 0.25), metavar="SHARE,...", help="(0.5,0.25)")
    add("--lengths", type=numbers, default=(1024, 2048, 4096), metavar="N,...",
        help="tokens (1024,2048,4096)")  # fmt: skip
    add("--seeds", type=numbers, default=(0, 1), metavar="N,...", help="of the cases (0,1)")
    add("--cases", type=int, default=24, metavar="N", help="unseen, of each length and seed (24)")
    add("--seen", type=int, default=4, metavar="N", help="cases in calibration's wordings (4)")
    add("--texts", type=int, default=3, metavar="N", help="windows of each kind and length (3)")
    return parsed(made, arguments)


def _check(options: argparse.Namespace) -> None:
    """Raise UsageError, before any work, for choices that cannot be."""
    if len(options.efforts) < 2:
        raise UsageError("--efforts compares two and more, the last of them the yardstick")
    for effort, budget in product(options.efforts, options.budgets):
        CompileRequest(effort=effort, budget=budget)
    names = tuple(f"{effort}.json" for effort in options.efforts)
    for seed, asked in _asked(options):
        EvalRequest(lengths=options.lengths, seed=seed, against=names, **asked)
    check_lengths(options.model, options.lengths)


def _result(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """What is told of every run, without plans and cases yet."""
    return {
        "benchmark": "efforts",
        "command": shlex.join(["python", "benchmarks/efforts.py", *arguments]),
        **origin(),
        **{name: list(getattr(options, name)) for name in ("efforts", "budgets", "lengths")},
        "seeds": list(options.seeds),
        "plans": [],
        "cases": [],
    }


def _plans(options: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        made_plan(
            options.model,
            effort,
            budget,
            work_dir=options.work_dir,
            planning=options.planning,
        )
        for budget in options.budgets
        for effort in options.efforts
    ]


def _packaged(options: argparse.Namespace) -> Path:
    """The package whose weights all plans run on, and the uniform plan of each budget."""
    effort, budget = options.efforts[-1], options.budgets[0]
    package = made_package(
        *(options.model, effort, budget), work_dir=options.work_dir, packaging=options.packaging
    )
    checkpoint = open_checkpoint(options.model)
    like = open_artifact(package, check="sizes").plan
    for budget in options.budgets:
        path = plan_path(options.work_dir, budget, UNIFORM)
        made_uniform(checkpoint, like, budget, path, lengths=options.lengths)
    return package


def _asked(options: argparse.Namespace) -> list[tuple[int, dict[str, Any]]]:
    """Seed and choices of each evaluation, the unseen wordings of all seeds first."""
    passkeys = [
        (seed, {"tasks": ("passkey",), "wording": wording, "samples": count})
        for wording, count in ((UNSEEN, options.cases), (SEEN, options.seen))
        for seed in options.seeds
    ]
    # windows of one seed never overlap, those of two may
    texts = [(options.seeds[0], {"tasks": ("nll",), "samples": options.texts})]
    return [(seed, asked) for seed, asked in [*passkeys, *texts] if asked["samples"]]


def _evaluations(options: argparse.Namespace, package: Path) -> Iterator[list[Case]]:
    """The cases of one evaluation after another."""
    for seed, asked in _asked(options):
        for budget in options.budgets:
            yield evaluated(
                package,
                options.model,
                {n: plan_path(options.work_dir, budget, n) for n in (UNIFORM, *options.efforts)},
                budget=budget,
                lengths=options.lengths,
                seed=seed,
                work_dir=options.work_dir,
                **asked,
            )


if __name__ == "__main__":
    raise SystemExit(main())
