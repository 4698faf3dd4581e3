"""docs/CLI.md is what `make docs` writes, and leaves nothing of the command line out."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from moac.cli.group import cli
from moac_runtime.commands import COMMANDS as RUNTIME
from moac_runtime.commands import command_parser

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "cli_reference.py"
PAGE = (ROOT / "docs" / "CLI.md").read_text(encoding="utf-8")
REFERENCE: dict[str, Any] = runpy.run_path(str(TOOL))
COMMANDS = sorted(cli.commands)


def section(command: str) -> str:
    """What the page says of one command."""
    found = re.search(rf"^## moac {command}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None, command
    return found[1]


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Default and meaning by the option's long name."""
    found = {}
    for line in re.findall(r"^\| (`-.*) \|$", text, re.MULTILINE):
        names, default, meaning = re.split(r" \| ", line.replace(r"\|", "¦"), maxsplit=2)
        found[re.findall(r"`(--[\w-]+)", names)[-1]] = (default, meaning)
    return found


def test_the_page_is_what_the_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["cli_reference.py", str(tmp_path / "CLI.md")])
    monkeypatch.setenv("COLUMNS", "40")  # the page does not follow the terminal
    runpy.run_path(str(TOOL), run_name="__main__")
    written = (tmp_path / "CLI.md").read_text(encoding="utf-8")
    assert written == PAGE, "docs/CLI.md is not of today's help; run: make docs"


def test_every_command_has_a_section() -> None:
    assert sorted(re.findall(r"^## moac (\w+)$", PAGE, re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in RUNTIME])
def test_every_option_stands_there_with_default_and_meaning(command: str) -> None:
    options = [found for found in cli.commands[command].params if isinstance(found, click.Option)]
    told = rows(section(command))
    assert set(told) == {name for found in options for name in found.opts if name[:2] == "--"}
    for found in options:
        default, meaning = told[found.opts[-1]]
        assert len(meaning) > 5
        if found.required:
            assert default == "required"
        elif found.show_default:
            assert default == str(found.default)
        elif found.is_flag:
            assert default == "off"


@pytest.mark.parametrize("command", RUNTIME)
def test_every_option_of_the_runtime_stands_there(command: str) -> None:
    told = rows(section(command))
    actions = {
        name: action
        for action in command_parser(command)._actions
        for name in action.option_strings
        if name.startswith("--") and name != "--help"
    }
    assert set(told) == set(actions)
    for name, action in actions.items():
        stated = action.default
        if isinstance(stated, int) and not isinstance(stated, bool):
            assert told[name][0] == str(stated)
    assert told["--threads"][0] == "every core it may use"


def test_defaults_are_cut_from_the_end_of_a_help_text() -> None:
    context = click.Context(click.Command("x"))
    option = click.Option(["--size"], metavar="N", help="full (as it is) or half  [the (old) one]")
    assert REFERENCE["_click_row"](option, context) == (
        "`--size N`",
        "the (old) one",
        "full (as it is) or half",
    )
    parser = argparse.ArgumentParser()
    action = parser.add_argument("-n", "--number", metavar="N", help="how many (see there) (4)")
    assert REFERENCE["_run_row"](action) == ("`-n`, `--number N`", "4", "how many (see there)")
    action = parser.add_argument("--plain", metavar="N", help="no default")
    assert REFERENCE["_run_row"](action) == ("`--plain N`", "none", "no default")


def test_a_cell_is_one_line_without_bars() -> None:
    assert REFERENCE["table"]([("`--a`", "b|c", "two\n lines <x>")]).splitlines()[2] == (
        r"| `--a` | b\|c | two lines \<x> |"
    )


def test_an_option_without_help_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = next(found for found in cli.commands["plan"].params if found.opts[-1] == "--output")
    monkeypatch.setattr(option, "help", None)
    monkeypatch.setattr(sys, "argv", ["cli_reference.py", str(tmp_path / "CLI.md")])
    with pytest.raises(SystemExit, match="no help text describes plan --output; write one"):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert not (tmp_path / "CLI.md").exists()


def test_what_the_page_says_of_variables_is_so() -> None:
    named = re.findall(r"^\| `([A-Z_]+)` \|", PAGE, re.MULTILINE)
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("moac", "runtime/moac_runtime", "kernels/moac_kernels")
        for path in (ROOT / folder).rglob("*.py")
    )
    assert named
    for name in named:  # read by itself, or by a constant of that name
        constant = f'\n{name} = "{name}"' in sources and f"environ.get({name}" in sources
        assert constant or f'environ.get("{name}"' in sources, name
