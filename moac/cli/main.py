"""The command line of the build host, one command after another."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moac.bench.command import bench_command
from moac.cli.clean import clean_command
from moac.cli.completion import RunCommand
from moac.cli.options import given, numbers, planning_options, size, words
from moac.doctor.command import doctor_command
from moac.extras import require
from moac_runtime.errors import CheckFailed, UsageError
from moac_runtime.host.process import run_process
from moac_runtime.package.weight_formats import WEIGHTS

if TYPE_CHECKING:
    from moac.pipeline.estimate import StageEstimate


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code: 0, 1, 2, 3 (check not held) or 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"]:
        # One parser for `moac run` and `python PACKAGE`, and nothing but the runtime loaded.
        from moac_runtime.command import main as run_main

        sys.exit(run_main(arguments[1:]))
    sys.exit(_invoke(arguments))


def _invoke(arguments: Sequence[str]) -> int:
    return run_process(
        lambda: _command(arguments),
        interrupted="interrupted; run the same command again to go on",
        short_of_memory="choose shorter lengths or fewer rows at once, or end other programs "
        "(moac compile --dry-run tells what a compile takes)",
    )


def _command(arguments: Sequence[str]) -> int:
    """Run a click command; what click raises becomes what our own code does."""
    try:
        cli.main(args=list(arguments), prog_name="moac", standalone_mode=False)
    except click.exceptions.Abort:  # click makes it of most interrupts
        raise KeyboardInterrupt from None
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "moac"
        sentence = error.format_message().removesuffix(".")
        raise UsageError(f"{sentence} (see {command} --help)") from None
    return 0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 99})
@click.version_option(package_name="moac")
def cli() -> None:
    """Compile long-context language models to packages that hold less KV memory.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a check did not hold, 130 interrupted.
    """


@cli.command(
    "run",
    cls=RunCommand,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run_command(arguments: tuple[str, ...]) -> None:
    """Answer prompts with a package: moac run PACKAGE --prompt TEXT (see moac run --help)."""
    from moac_runtime.command import main as run_main

    sys.exit(run_main(list(arguments)))


@cli.command("plan")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="the plan.json to write",
)
@planning_options
def plan_command(
    model: str,
    output: Path,
    work_dir: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Plan MODEL without packaging it: write plan.json, which moac compile --plan takes.

    The stages are those of moac compile, kept in the same work folder.
    """
    require("compile")
    from moac.request import CompileRequest

    request = CompileRequest(**given(choices))
    if dry_run:
        from moac.pipeline.estimate import estimate_plan

        stages = estimate_plan(model, output, request, force=force, work_dir=work_dir)
        _show_estimate(stages, as_json=as_json)
        return
    from moac.pipeline.planner import plan_model
    from moac.show.summary import plan_summary

    result = plan_model(model, output, request=request, work_dir=work_dir, force=force)
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else plan_summary(result))


@cli.command("compile")
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
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="a plan.json made for this model, in place of planning",
)
@click.option(
    "--target",
    "targets",
    callback=words,
    metavar="NAME,...",
    help="backends to build for: torch, cpu (native kernels), onnx, cuda (every architecture), "
    "cuda:80, cuda:90, ...  [torch, and cpu where there is a C++ compiler]",
)
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="full",
    show_default=True,
    help="how weights are stored: full (as --dtype says), or int8, every matrix in 8 bits "
    "with a scale for each row, half the bytes of bfloat16",
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
    plan: Path | None,
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
        _show_estimate(stages, as_json=as_json)
        return
    from moac.pipeline.compiler import compile_model
    from moac.show.summary import compile_summary

    result = compile_model(
        model, output, request=request, plan=plan, work_dir=work_dir, force=force
    )
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else compile_summary(result))


def _show_estimate(stages: Sequence[StageEstimate], *, as_json: bool) -> None:
    from moac.show.summary import estimate_table

    told = [stage.to_json() for stage in stages]
    click.echo(json.dumps(told, indent=2) if as_json else estimate_table(stages))


@cli.command("inspect")
@click.argument("package", type=click.Path(path_type=Path, readable=False))
@click.option("--json", "as_json", is_flag=True, help="everything as JSON")
def inspect_command(package: Path, as_json: bool) -> None:
    """Show PACKAGE: its plan, density and KV bytes at each length, kernels, provenance."""
    from moac.show.inspection import inspect_package
    from moac.show.summary import inspection_text
    from moac.show.terminal_map import Look

    found = inspect_package(package)
    look = Look.of(sys.stdout)
    click.echo(json.dumps(found, indent=2) if as_json else inspection_text(found, look))


@cli.command("report")
@click.argument("package", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--eval",
    "results",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="what `moac eval PACKAGE --json` printed: adds quality by length and depth",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="the page to write, outside of PACKAGE",
)
def report_command(package: Path, results: Path | None, output: Path) -> None:
    """Write PACKAGE's report anew as one HTML page, with what an evaluation found.

    The page inside PACKAGE stays as it is: its hash stands in the manifest.
    """
    from moac.show.inspection import inspect_package
    from moac.show.report import read_evaluation, render_report

    if output.resolve().is_relative_to(package.resolve()):
        raise UsageError(
            f"{output} is inside the package {package}, whose files are hashed; give -o a path "
            "outside of it"
        )
    found = inspect_package(package)
    evaluation = None if results is None else read_evaluation(results, found)
    page = render_report(found, evaluation)
    try:
        output.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(
            f"{output} cannot be written ({error.strerror}); give -o a path that can"
        ) from None
    click.echo(str(output))


@cli.command("diff")
@click.argument("a", type=click.Path(path_type=Path, readable=False))
@click.argument("b", type=click.Path(path_type=Path, readable=False))
@click.option("--json", "as_json", is_flag=True, help="everything as JSON")
def diff_command(a: Path, b: Path, as_json: bool) -> None:
    """Compare A and B, each a package or a plan.json: spans, memory, losses, provenance."""
    from moac.show.diff_summary import diff_text
    from moac.show.diffing import diff, open_side

    found = diff(open_side(a), open_side(b))
    click.echo(json.dumps(found, indent=2) if as_json else diff_text(found))


@cli.command("verify")
@click.argument("package", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--source",
    metavar="MODEL",
    help="the checkpoint it was compiled from: compare with the original model",
)
@click.option(
    "--lengths",
    callback=numbers,
    metavar="N,N,...",
    help="prompt lengths for --source, in tokens  [64,1000,4000]",
)
@click.option("--json", "as_json", is_flag=True, help="the checks as JSON")
def verify_command(
    package: Path, source: str | None, lengths: tuple[int, ...] | None, as_json: bool
) -> None:
    """Check PACKAGE: its files, its golden logits and, with --source, the original model."""
    require("torch" if source is None else "compile")
    from moac.pipeline.verify import verify

    checkpoint = None
    if source is not None:
        from moac.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(source)
    checks = []
    for check in verify(package, checkpoint=checkpoint, lengths=lengths):
        checks.append(check)
        if not as_json:
            word = "ok    " if check.ok else "FAILED"
            click.echo(f"{word}  {check.name}  {check.value:.4g} (limit {check.limit:.4g})")
    failed = [check for check in checks if not check.ok]
    if as_json:
        found = {"ok": not failed, "checks": [check.to_json() for check in checks]}
        click.echo(json.dumps(found, indent=2))
    if failed:
        raise CheckFailed(failed[0].reason or f"{package} does not hold what it promises")


@cli.command("eval")
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


cli.add_command(bench_command)
cli.add_command(doctor_command)
cli.add_command(clean_command)
