"""The program `moac`: what it runs, how errors are told, and its exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from moac.packaging.own_kernels import own_library
from moac_runtime.commands import COMMANDS, command_main
from moac_runtime.errors import UsageError
from moac_runtime.host.cores import spin_briefly
from moac_runtime.host.process import run_process


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code: 0, 1, 2, 3 (check not held) or 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        # One parser for `moac run` and `python PACKAGE`, and nothing but the runtime loaded.
        sys.exit(command_main(arguments[0])(arguments[1:], build=own_library))
    if arguments[:1] != ["bench"]:  # which measures torch as it comes
        spin_briefly()
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
    import click  # here, since `moac run` takes neither it nor any other command

    from moac.cli.group import cli

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
