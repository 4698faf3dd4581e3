"""Write docs/CLI.md: every command with its options, their defaults and what they mean.

    python tools/cli_reference.py docs/CLI.md

What it says is what `--help` says, read from the parsers themselves. A default stands at the end
of a help text: in brackets after two spaces for click's commands, in parentheses for `moac run`.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from moac.cli.group import cli
from moac_runtime.commands import COMMANDS, command_parser

Row = tuple[str, str, str]

NONE, OFF, REQUIRED = "none", "off", "required"
_CLICK_DEFAULT = re.compile(r"(?P<text>.*\S)\s{2,}\[(?P<default>.+)\]", re.DOTALL)
_RUN_DEFAULT = re.compile(r"(?P<text>.*\S)\s\((?P<default>[^()]+)\)", re.DOTALL)

HEAD = """\
# The command line

`make docs` writes this page from the program's own help, so it says what `moac COMMAND --help`
says. The guides tell what the commands are for: [compiling](COMPILE.md), [running](RUN.md),
[measuring](MEASURE.md).

Results go to standard output and everything else goes to standard error. With `--json` a command
prints one JSON document on standard output and nothing else there; `moac bench` takes the name of
a file for it. `moac --version` prints the version, and `-h` or `--help` after any command prints
its help.

## Exit codes

| code | meaning |
|---|---|
| 0 | The command did what was asked. |
| 1 | It failed; one sentence on standard error says why and what to do. |
| 2 | It was used wrongly: an option, a value or a combination cannot be. |
| 3 | A check did not hold: of `compile`, `verify` or `eval`, or of the signature that was \
asked for. |
| 130 | Ctrl-C interrupted it. The same `compile`, `plan` or `eval` goes on where it stopped. |
| 143, 129 | SIGTERM or SIGHUP ended it. |

## Environment variables

| variable | meaning |
|---|---|
| `MOAC_CACHE` | The work folder of `plan`, `compile`, `eval` and `clean`. Without it, `moac` in \
`$XDG_CACHE_HOME`, or in `~/.cache`; kernels for packages that are not \
trusted are kept there too. |
| `XDG_STATE_HOME` | Where [trusted packages](TRUST.md) are recorded, in `moac/trusted`; \
otherwise `~/.local/state`. |
| `OMP_NUM_THREADS` | The CPU threads to use, where `--threads` says nothing. |
| `MOAC_CPU` | The instruction set of the native CPU kernels, where `--cpu` says nothing. |
| `CXX` | The C++ compiler that builds the native CPU kernels; otherwise g++, c++ or clang++. |
| `NO_COLOR` | Turns off the colours of the heat map that `inspect` prints. |

## Shell completion

A shell completes commands, options and their values once one of these lines stands in
`~/.bashrc`, `~/.zshrc` or `~/.config/fish/config.fish`:

```text
eval "$(_MOAC_COMPLETE=bash_source moac)"
eval "$(_MOAC_COMPLETE=zsh_source moac)"
_MOAC_COMPLETE=fish_source moac | source
```
"""


def reference() -> str:
    """The whole page."""
    commands = [
        runtime_section(name) if name in COMMANDS else command_section(name, command)
        for name, command in cli.commands.items()
    ]
    return "\n".join([HEAD, "\n\n".join(commands)]) + "\n"


def command_section(name: str, command: click.Command) -> str:
    """A command of click's: usage, what it does, its options."""
    context = click.Context(command, info_name=f"moac {name}")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    rows = [_click_row(found, context) for found in command.params if _is_option(found)]
    parts = [f"## moac {name}", f"```text\n{usage}\n```", inspect.cleandoc(command.help or "")]
    return "\n\n".join([*parts, table(rows)])


_OTHERWISE = {"run": "python PACKAGE [OPTIONS]"}
_ALSO = {"run": " A package takes the same options when Python runs it."}


def runtime_section(name: str) -> str:
    """A command of the runtime's, whose parser is argparse's."""
    parser = command_parser(name)
    other = _OTHERWISE.get(name, f"python -m moac_runtime {name} PACKAGE [OPTIONS]")
    parts = [
        f"## moac {name}",
        f"```text\nmoac {name} PACKAGE [OPTIONS]\n{other}\n```",
        f"{parser.description}{_ALSO.get(name, '')}",
    ]
    for group in parser._action_groups:
        rows = [_run_row(found) for found in group._group_actions if _is_run_option(found)]
        if rows:
            parts += [f"### {str(group.title).capitalize()}", group.description or "", table(rows)]
    return "\n\n".join(part for part in parts if part)


def table(rows: Sequence[Row]) -> str:
    """Options in Markdown, one a line."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)])


def _is_option(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Option) and not parameter.hidden


def _is_run_option(action: argparse.Action) -> bool:
    return bool(action.option_strings) and action.dest != "help"


def _click_row(option: click.Parameter, context: click.Context) -> Row:
    assert isinstance(option, click.Option)
    found = _CLICK_DEFAULT.fullmatch(option.help or "")
    text = found["text"] if found else option.help or ""
    if option.required:
        default = REQUIRED
    elif found:
        default = found["default"]
    elif option.is_flag:
        default = OFF
    else:
        default = str(option.get_default(context)) if option.show_default else NONE
    value = "" if option.is_flag else option.make_metavar(context)
    return _names(option.opts, value), default, text


def _run_row(action: argparse.Action) -> Row:
    found = _RUN_DEFAULT.fullmatch(action.help or "")
    text = found["text"] if found else action.help or ""
    is_flag = action.nargs == 0
    default = found["default"] if found else OFF if is_flag else NONE
    return _names(action.option_strings, "" if is_flag else str(action.metavar)), default, text


def _names(names: Sequence[str], value: str) -> str:
    *others, last = names
    return ", ".join(f"`{name}`" for name in (*others, f"{last} {value}".rstrip()))


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", r"\<").strip()


def undescribed() -> Iterator[str]:
    """Options that no help text describes, as `COMMAND OPTION`."""
    for name, command in cli.commands.items():
        for option in command.params:
            if isinstance(option, click.Option) and not (option.help or option.hidden):
                yield f"{name} {option.opts[-1]}"
    for name in COMMANDS:
        for action in command_parser(name)._actions:
            if not action.help:
                yield f"{name} {action.dest}"


def main() -> None:
    """Write the page. Exits with a sentence where an option has no description."""
    parser = argparse.ArgumentParser(description="Write the reference of the command line.")
    parser.add_argument("target", type=Path)
    target: Path = parser.parse_args().target
    if missing := list(undescribed()):
        sys.exit(f"error: no help text describes {', '.join(missing)}; write one")
    target.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
