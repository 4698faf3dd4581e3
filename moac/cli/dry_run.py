"""`--dry-run` of the commands that plan: the stages ahead, and nothing done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from moac.pipeline.estimate import StageEstimate


def show_estimate(stages: Sequence[StageEstimate], *, as_json: bool) -> None:
    """Print each stage with its time and memory."""
    from moac.show.summary import estimate_table

    told = [stage.to_json() for stage in stages]
    click.echo(json.dumps(told, indent=2) if as_json else estimate_table(stages))
