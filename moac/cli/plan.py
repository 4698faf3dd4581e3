"""`moac plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moac.cli.dry_run import show_estimate
from moac.cli.options import given, planning_options
from moac.extras import require


@click.command("plan")
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
        show_estimate(stages, as_json=as_json)
        return
    from moac.pipeline.planner import plan_model
    from moac.show.summary import plan_summary

    result = plan_model(model, output, request=request, work_dir=work_dir, force=force)
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else plan_summary(result))
