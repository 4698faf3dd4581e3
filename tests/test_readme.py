"""README and guides: commands and snippets run, on a tiny checkpoint in the real one's place."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import Compiled, moac_command, options, plan_options, request

import moac

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
LINKED = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "BENCHMARKS.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CHECKPOINT = ".cache/smollm2-135m-instruct"
TINY = {"60MiB": "1.5MiB", "0.1": "5"}  # what is asked for, of the tiny checkpoint
MAKE_TARGETS = {"quickstart", "test"}
COMMANDS = ("compile", "plan", "run", "inspect", "verify", "eval", "bench", "doctor", "clean")


def blocks(language: str) -> list[str]:
    """The pages' fenced blocks of one language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [block for page in PAGES.values() for block in fence.findall(page)]


def commands() -> list[str]:
    """Every line of the pages' shell blocks, in order, each once."""
    return list(dict.fromkeys(line for block in blocks("sh") for line in block.splitlines()))


def shell_commands() -> list[str]:
    """Those that a checkpoint is enough for: all but the set-up."""
    return [line for line in commands() if not line.startswith("make ")]


@pytest.fixture
def workplace(tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the project after `make quickstart`, on the tiny checkpoint."""
    (tmp_path / ".cache").mkdir()
    (tmp_path / CHECKPOINT).symlink_to(tiny_package.checkpoint)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(tiny_package.package, tmp_path / "out")
    shutil.copy(tiny_package.package / "plan.json", tmp_path / ".cache")
    (tmp_path / "plans").mkdir()
    shutil.copy(tiny_package.package / "plan.json", tmp_path / "plans")
    monkeypatch.setattr("moac.pipeline.known.PLANS", tmp_path / "plans")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOAC_CACHE", str(tiny_package.work_dir))
    monkeypatch.setattr(moac, "CompileRequest", request, raising=False)
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of one line: in this process where it can be, which saves the imports."""
    words = [TINY.get(word, word) for word in shlex.split(command)]
    if words[0] == "moac":
        tiny = {"compile": options(), "plan": plan_options()}.get(words[1], [])
        if "--plan" in words:
            tiny = ["--target", "torch"]
        return moac_command(*words[1:], *tiny)
    if words[0] == "python" and words[1].startswith("examples/"):
        return script(words[1:], monkeypatch)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
    ).returncode


def script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", words)
        patched.syspath_prepend(Path(words[0]).resolve().parent)  # as python itself does
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def test_the_commands_are_found() -> None:
    found = commands()
    starts = [f"moac {name}" for name in COMMANDS]
    for start in (
        *starts,
        "python out/",
        "python examples/compile_model.py",
        "python examples/run_package.py",
    ):
        assert any(line.startswith(start) for line in found), start
    assert {line.removeprefix("make ") for line in set(found) - set(shell_commands())} == (
        MAKE_TARGETS
    )


@pytest.mark.parametrize("command", shell_commands())
def test_a_command_runs(
    command: str,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(command, monkeypatch) == 0, capsys.readouterr().err
    assert (workplace / "out" / "moac.json").is_file()


@pytest.mark.parametrize("snippet", blocks("python"))
def test_a_snippet_runs(snippet: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(snippet, "docs/RUN.md", "exec"), {})
    density = float(capsys.readouterr().out.splitlines()[0])
    assert 0.4 < density <= 0.5  # the tiny model has few spans to choose from


def test_examples_end_in_a_sentence(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(["examples/run_package.py", "nowhere"], monkeypatch) == 1
    assert script(["examples/compile_model.py", "./nowhere", "out"], monkeypatch) == 1
    wrong = ["examples/compile_model.py", CHECKPOINT, "out", "--budget", "2"]
    assert script(wrong, monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["error:"] * 3


def test_the_makefile_has_what_the_pages_call() -> None:
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = [words for page in PAGES.values() for words in re.findall(r"`make ([a-z -]+)`", page)]
    targets = {*MAKE_TARGETS, *(word for words in named for word in words.split())}
    assert targets >= {"test-slow", "test-oldest", "test-newest", "lock", "lint", "types"}
    for target in targets:
        assert re.search(rf"^{target}:", rules, re.MULTILINE), target
    assert "-c constraints.txt" in README
    assert "$(call install,$(BIN),constraints.txt,dev)" in rules
    assert "--constraint $(2)" in rules


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


def anchors(page: Path) -> set[str]:
    """What a link into `page` may name: its headings, as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    links += re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_guide_is_linked_from_the_readme() -> None:
    guides = {str(path) for path in PAGES if path.parts[0] == "docs"}
    assert guides <= set(re.findall(r"\]\(([^)#]+)", README))
