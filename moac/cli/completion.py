"""What a shell completes after `moac run` and its like, whose options argparse knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import argparse


class RuntimeCommand(click.Command):
    """Takes every word as it is; a shell that completes is shown the runtime's parameters."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Those of the runtime's parser where a shell asks (`resilient_parsing`), else its own."""
        if not ctx.resilient_parsing:
            return super().get_params(ctx)
        from moac_runtime.commands import command_parser

        return [_parameter(action) for action in command_parser(str(self.name))._actions]


def _parameter(action: argparse.Action) -> click.Parameter:
    if not action.option_strings:
        return click.Argument([action.dest], required=False, type=click.Path())
    if action.nargs == 0:
        return click.Option(action.option_strings, is_flag=True, help=action.help)
    return click.Option(
        action.option_strings,
        help=action.help,
        multiple=_repeats(action),
        type=_values(action),
    )


def _repeats(action: argparse.Action) -> bool:
    from argparse import _AppendAction

    return isinstance(action, _AppendAction)


def _values(action: argparse.Action) -> click.ParamType[Any] | None:
    """What an option's value is chosen from: names, files, or anything."""
    from moac_runtime.backends.open import BACKENDS
    from moac_runtime.package.dtypes import DTYPE_BYTES

    choices = {"backend": BACKENDS, "dtype": tuple(DTYPE_BYTES)}
    if action.dest in choices:
        return click.Choice(choices[action.dest])
    return click.Path() if action.metavar == "FILE" else None
