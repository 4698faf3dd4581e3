"""`moac compile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moac.cli.dry_run import show_estimate
from moac.cli.options import given, planning_options, size, words
from moac.extras import require
from moac_runtime.package.weight_formats import WEIGHTS


@click.command("compile")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="the package to write, a directory",
)
@click.option(
    "--plan",
    type=click.Path(),
    metavar="FILE|known",
    help="in place of planning: a plan.json made for this model, or the word known for the plan "
    "of this model and --budget that moac brings, measured beforehand",
)
@click.option(
    "--target",
    "targets",
    callback=words,
    metavar="NAME,...",
    help="backends to build for: torch, cpu (native kernels for this kind of processor), "
    "cpu:avx2, cpu:arm64, ..., onnx, cuda (every architecture), cuda:80, cuda:90, ...  "
    "[torch, and cpu where there is a C++ compiler]",
)
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="full",
    show_default=True,
    help="how weights are stored: full (as --dtype says); int8, every matrix in 8 bits with a "
    "scale for each row, half the bytes of bfloat16; int4, the layers' in 4 bits with a scale and "
    "an offset for each 32, embedding and head in 8, about a third of the bytes",
)
@click.option(
    "--onnx-dtype",
    metavar="NAME",
    help="dtype of the ONNX graph, float32 or float16  [--dtype, float32 for bfloat16]",
)
@click.option(
    "--onnx-weights",
    default="shared",
    show_default=True,
    metavar="NAME",
    help="weights of the ONNX graph: shared (the package's own) or int8",
)
@click.option(
    "--max-shard-size",
    default="1GB",
    show_default=True,
    callback=size,
    metavar="SIZE",
    help="largest weight file, as 2GB or 500MiB",
)
@planning_options
def compile_command(
    model: str,
    output: Path,
    plan: str | None,
    work_dir: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Compile MODEL, a checkpoint directory, hub id or .gguf file, into a package.

    Finds out how far back each attention head looks, hands the budget out over the heads, writes
    the package and verifies it.
    """
    require("compile")
    from moac.request import CompileRequest

    request = CompileRequest(**given(choices))
    if dry_run:
        from moac.pipeline.estimate import estimate

        stages = estimate(model, output, request, force=force, plan=plan, work_dir=work_dir)
        show_estimate(stages, as_json=as_json)
        return
    from moac.pipeline.compiler import compile_model
    from moac.show.summary import compile_summary

    result = compile_model(
        model, output, request=request, plan=plan, work_dir=work_dir, force=force
    )
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else compile_summary(result))
