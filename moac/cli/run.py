"""`moac run`, `moac serve` and `moac chat`, whose options are the runtime's."""

from __future__ import annotations

import sys
from typing import Any

import click

from moac.cli.completion import RuntimeCommand
from moac.packaging.own_kernels import own_library
from moac_runtime.commands import command_main

_AS_THEY_COME: dict[str, Any] = {
    "cls": RuntimeCommand,
    "add_help_option": False,
    "context_settings": {"ignore_unknown_options": True},
}


@click.command("run", **_AS_THEY_COME)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run_command(arguments: tuple[str, ...]) -> None:
    """Answer prompts with a package: moac run PACKAGE --prompt TEXT (see moac run --help)."""
    sys.exit(command_main("run")(list(arguments), build=own_library))


@click.command("serve", **_AS_THEY_COME)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve_command(arguments: tuple[str, ...]) -> None:
    """Serve a package to OpenAI's clients: moac serve PACKAGE (see moac serve --help)."""
    sys.exit(command_main("serve")(list(arguments), build=own_library))


@click.command("chat", **_AS_THEY_COME)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def chat_command(arguments: tuple[str, ...]) -> None:
    """Talk with a package in the terminal: moac chat PACKAGE (see moac chat --help)."""
    sys.exit(command_main("chat")(list(arguments), build=own_library))
