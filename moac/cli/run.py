"""`moac run`, whose options are the runtime's."""

from __future__ import annotations

import sys

import click

from moac.cli.completion import RunCommand


@click.command(
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
