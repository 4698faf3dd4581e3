"""What shells complete: scripts, commands, and the options of `moac run`, which argparse reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moac.cli.group import cli
from moac_runtime.command import run_parser

MOAC = "from moac.cli.main import main; main()"


def asked(shell: str, **environment: str) -> str:
    """What `moac` answers a shell."""
    done = subprocess.run(
        [sys.executable, "-c", MOAC],
        env={**os.environ, "_MOAC_COMPLETE": shell, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def offered(line: str) -> list[str]:
    """What is offered for the last word of a line, as bash is told."""
    place = str(len(line.split(" ")) - 1)
    told = asked("bash_complete", COMP_WORDS=line, COMP_CWORD=place)
    return told.split()


def test_commands_are_offered() -> None:
    assert offered("moac ") == [f"plain,{name}" for name in sorted(cli.commands)]
    assert offered("moac do") == ["plain,doctor"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("moac run ", ["file,"]),
        ("moac run --raw ", ["file,"]),
        ("moac run --ba", ["plain,--backend"]),
        ("moac run out --to", ["plain,--top-k", "plain,--top-p"]),
        ("moac run out --backend ", ["plain,cpu", "plain,cuda", "plain,onnx", "plain,torch"]),
        ("moac run out --dtype=b", ["plain,bfloat16"]),
        ("moac run out --prompt-file ", ["file,"]),
        ("moac run out --prompt ", []),
        ("moac run out --prompt hi --prompt-f", ["plain,--prompt-file"]),
        ("moac run out --stop a --sto", ["plain,--stop"]),
        ("moac compile m --weights ", ["plain,full", "plain,int8", "plain,int4"]),
        ("moac inspect ", ["file,"]),
    ],
)
def test_options_and_values_are_offered(line: str, words: list[str]) -> None:
    assert offered(line) == words


def test_every_option_of_run_is_offered() -> None:
    known = [name for action in run_parser()._actions for name in action.option_strings]
    assert offered("moac run -") == [f"plain,{name}" for name in known]


def test_help_comes_along() -> None:
    told = asked("zsh_complete", COMP_WORDS="moac run out --max-t", COMP_CWORD="3")
    assert told.splitlines() == ["plain", "--max-tokens", "longest answer (256)"]
    told = asked("fish_complete", COMP_WORDS="moac run out", COMP_CWORD="--max-t")
    assert told == "plain,--max-tokens\tlongest answer (256)\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_printed(shell: str) -> None:
    script = asked(f"{shell}_source")
    assert f"_MOAC_COMPLETE={shell}_complete" in script
    assert "moac" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(tmp_path: Path) -> None:
    program = tmp_path / "moac"
    program.write_text(f"#!{sys.executable}\n{MOAC}\n")
    program.chmod(0o755)
    script = (
        'eval "$(_MOAC_COMPLETE=bash_source moac)"; complete -p moac\n'
        "COMP_WORDS=(moac run out --backend c) COMP_CWORD=4; _moac_completion moac\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-euc", script],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == ["cpu", "cuda"]
    assert "-F _moac_completion moac" in done.stdout


def test_words_pass_through_where_no_shell_asks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["run", "nowhere", "--backend", "no such", "--prompt", "hi"])
    assert left.value.code == 2
    assert "there is no backend 'no such'" in capsys.readouterr().err
