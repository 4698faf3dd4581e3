"""The runtime's commands by name: `run`, `serve` and `chat`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module

COMMANDS = {
    "run": "moac_runtime.command",
    "serve": "moac_runtime.serve.command",
    "chat": "moac_runtime.chat_command",
}


def command_main(name: str) -> Callable[..., int]:
    """What runs a command's arguments and returns its exit code; nothing else is loaded.

    It also takes `build`, which makes native kernels for a package whose own must not run.
    """
    found: Callable[..., int] = import_module(COMMANDS[name]).main
    return found


def command_parser(name: str) -> argparse.ArgumentParser:
    """What a command takes, for whoever completes or documents it."""
    found: argparse.ArgumentParser = import_module(COMMANDS[name]).parser()
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names; exit code 2 where it names none."""
    from moac_runtime.errors import UsageError
    from moac_runtime.host.process import run_process

    if arguments and arguments[0] in COMMANDS:
        return command_main(arguments[0])(arguments[1:])

    def refuse() -> int:
        named = ", ".join(COMMANDS)
        raise UsageError(f"the first argument names the command; give one of {named}")

    return run_process(refuse, short_of_memory="")
