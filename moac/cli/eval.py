"""`moac eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moac.cli.options import numbers, words
from moac.extras import require


@click.command("eval")
@click.argument("package", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--source",
    required=True,
    metavar="MODEL",
    help="the checkpoint it was compiled from",
)
@click.option(
    "--tasks",
    callback=words,
    metavar="NAME,...",
    help="passkey, longeval, ruler (eleven tasks, or name some of them) and nll  "
    "[all of them; with --task FILE only that]",
)
@click.option(
    "--lengths",
    callback=numbers,
    metavar="N,N,...",
    help="tokens of prompt and answer together  [the planned lengths]",
)
@click.option(
    "--samples",
    default=50,
    show_default=True,
    metavar="N",
    help="cases for each task and length; windows of each kind of text",
)
@click.option(
    "--against",
    default="dense,uniform",
    show_default=True,
    callback=words,
    metavar="NAME,...",
    help="plans to compare with, on the same weights: dense, uniform, layerwise, a plan.json",
)
@click.option(
    "--task",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='a task of your own, JSONL of {"prompt"|"messages", "answer"}',
)
@click.option(
    "--wording",
    metavar="KIND",
    help="unseen (in words that calibration never uses), seen, or both, half of the cases each  "
    "[both]",
)
@click.option(
    "--text",
    callback=words,
    metavar="KIND,...",
    help="what nll reads: prose, code, documentation  [all of them]",
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="seed of the cases")
@click.option("--batch", default=8, show_default=True, metavar="N", help="cases run at once")
@click.option(
    "--backend",
    metavar="NAME",
    help="what runs the model: cpu (the package's native kernels) or torch  [cpu where it runs]",
)
@click.option(
    "--cpu", metavar="SET", help="instruction set of the backend cpu: avx2, ...  [the best here]"
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="where finished cells are kept, to go on from  [$MOAC_CACHE or ~/.cache/moac]",
)
@click.option("--json", "as_json", is_flag=True, help="the results as JSON")
def eval_command(
    package: Path, source: str, work_dir: Path | None, as_json: bool, **choices: Any
) -> None:
    """Evaluate PACKAGE: retrieval, and plain text's NLL, beside other plans on the same weights.

    Everything is made on this machine and runs through the packaged runtime. The same command
    goes on where it was interrupted.
    """
    require("compile")
    from moac.evaluation import EvalRequest, evaluate, evaluation_text

    found = evaluate(package, source, request=EvalRequest(**choices), work_dir=work_dir)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else evaluation_text(found))
