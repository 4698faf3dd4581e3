"""Results alone on standard output, whatever native code prints there by itself."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import highspy
import pytest
from tiny import Compiled, options, plan_options

from moac.planning.highs import new_solver
from moac_runtime.host.streams import native_output_dropped, results_alone

ROOT = Path(__file__).parents[1]
Capture = pytest.CaptureFixture[str]

# Runs commands one after the other, each with a file as descriptor 1, in a process where a
# library prints just before every result: past C's buffer, into it, and from a child process.
NOISY = """
import ctypes, json, os, subprocess, sys

libc, dumps = ctypes.CDLL(None), json.dumps

def noisy(*arguments, **options):
    os.write(1, b"written\\n")
    libc.printf(b"buffered\\n")
    subprocess.run(["echo", "inherited"], check=True)
    return dumps(*arguments, **options)

json.dumps = noisy
from moac.cli.main import main

for target, command in json.load(open(sys.argv[1], encoding="utf-8")):
    with open(target, "wb") as file:
        os.dup2(file.fileno(), 1)
    try:
        main(command)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    sys.stdout.flush()
    libc.fflush(None)
    if code != 0:
        sys.exit(f"{command} ended with {code}")
"""


def commands(tiny: Compiled, folder: Path) -> dict[str, list[Any]]:
    """Every command that has --json, on the tiny package."""
    source = ("--source", tiny.checkpoint)
    asked = ("--json", "--force", "--work-dir", tiny.work_dir)
    asked = (*asked, "--budget", "0.4")  # of the stages, all that solve run again
    plan = ["plan", tiny.checkpoint, *plan_options(), "-o", folder / "p.json", *asked]
    compile_ = ["compile", tiny.checkpoint, *options(), "-o", folder / "out", *asked]
    few = ("--tasks", "passkey", "--lengths", "512", "--samples", "1", "--against", "dense")
    short = ("--against", "moac", "--context", "32", "--tokens", "2", "--threads", "1")
    return {
        "check": ["check", tiny.checkpoint, "--json"],
        "plan": plan,
        "plan --dry-run": [*plan, "--dry-run"],
        "compile": compile_,
        "compile --dry-run": [*compile_, "--dry-run"],
        "inspect": ["inspect", tiny.package, "--json"],
        "diff": ["diff", tiny.package, tiny.package, "--json"],
        "verify": ["verify", tiny.package, "--json"],
        "verify --source": ["verify", tiny.package, *source, "--lengths", "64", "--json"],
        "eval": ["eval", tiny.package, *source, *few, "--json"],
        "bench": ["bench", tiny.package, *short, "--json", "-"],
        "run": ["run", tiny.package, "--prompt", "hi", "--max-tokens", "2", "--json"],
        "doctor": ["doctor", tiny.package, "--json"],
        "clean": ["clean", "--work-dir", tiny.work_dir, "--json"],
    }


NAMES = (
    *("check", "plan", "plan --dry-run", "compile", "compile --dry-run", "inspect", "diff"),
    *("verify", "verify --source", "eval", "bench", "run", "doctor", "clean"),
)


def in_a_process(
    script: str, *arguments: object, redirect: str = "", **variables: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `script`, started through a shell."""
    path = [variables.pop("PYTHONPATH", ""), *sys.path]
    variables |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    line = f'"$0" -c "$@" {redirect}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, script, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        encoding=variables.get("PYTHONIOENCODING", "utf-8"),
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def printed(
    tiny_package: Compiled, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, str]]:
    """What each command wrote to descriptor 1, and all of them together to descriptor 2."""
    folder = tmp_path_factory.mktemp("streams")
    lines = commands(tiny_package, folder)
    tasks = [[str(folder / name), list(map(str, line))] for name, line in lines.items()]
    (folder / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    code, _, err = in_a_process(NOISY, folder / "tasks.json")
    assert code == 0, err
    return {name: ((folder / name).read_text(encoding="utf-8"), err) for name in lines}


@pytest.mark.parametrize("name", NAMES)
def test_json_stands_alone_though_libraries_print(
    name: str, printed: dict[str, tuple[str, str]]
) -> None:
    out, err = printed[name]
    assert json.loads(out)
    for words in ("written", "buffered", "inherited"):
        assert err.count(f"{words}\n") >= len(NAMES)


def test_every_command_with_json_is_tried(tiny_package: Compiled, tmp_path: Path) -> None:
    from moac.cli.group import cli

    has = {
        name
        for name, command in cli.commands.items()
        if any("--json" in parameter.opts for parameter in command.params)
    }
    tried = commands(tiny_package, tmp_path)
    assert tuple(tried) == NAMES
    assert {name.split()[0] for name in tried} == has | {"run"}


def test_planning_from_python_prints_nothing(tiny_package: Compiled, tmp_path: Path) -> None:
    script = """
import sys, moac, tiny
checkpoint, target, work_dir = sys.argv[1:]
moac.plan_model(checkpoint, target, request=tiny.request(budget=0.4), work_dir=work_dir)
"""
    words = [tiny_package.checkpoint, tmp_path / "p.json", tiny_package.work_dir]
    code, out, err = in_a_process(script, *words, PYTHONPATH=str(ROOT / "tests"))
    assert (code, out) == (0, ""), err


# ---- the solver


def test_a_solver_is_made_in_silence(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Greeting(highspy.Highs):
        def __init__(self) -> None:
            super().__init__()
            os.write(1, b"Running HiGHS\n")
            ctypes.CDLL(None).printf(b"Copyright\n")

    monkeypatch.setattr(highspy, "Highs", Greeting)
    new_solver()
    ctypes.CDLL(None).fflush(None)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_there_is_one_way_to_a_solver() -> None:
    sources = (*(ROOT / "moac").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"))
    made = [path.name for path in sources if "highspy.Highs()" in path.read_text("utf-8")]
    assert made == ["highs.py"]


# ---- the descriptors


def test_a_command_prints_its_results_in_order() -> None:
    script = """
import os, sys
from moac_runtime.host.streams import results_alone

print("before")
with results_alone():
    os.write(1, b"noise\\n")
    print("result")
    os.write(1, b"more noise\\n")
    print("é", file=sys.__stdout__)
print("after", flush=True)
os.write(1, b"last\\n")
"""
    code, out, err = in_a_process(script)
    assert (code, out, err) == (0, "before\nresult\né\nafter\nlast\n", "noise\nmore noise\n")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_results_are_encoded_and_buffered_as_before(encoding: str, unbuffered: str) -> None:
    script = """
import os, sys
from moac_runtime.host.streams import results_alone

before = sys.stdout
with results_alone():
    for name in ("encoding", "errors", "line_buffering", "write_through"):
        assert getattr(sys.stdout, name) == getattr(before, name), name
    assert sys.stdout.isatty() == before.isatty()
    assert sys.stdout.fileno() not in (1, before.fileno())
    assert not os.get_inheritable(sys.stdout.fileno())
    print("é", end="")
    os.write(before.fileno(), b"noise ")
"""
    variables = {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": unbuffered}
    code, out, err = in_a_process(script, redirect="2>&1", **variables)
    # one pipe for both: what is not buffered comes first
    assert (code, out) == (0, "énoise " if unbuffered else "noise é"), err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_stay_closed(closed: str, tmp_path: Path) -> None:
    script = f"""
import os
from moac_runtime.host.streams import native_output_dropped, results_alone

def is_open(descriptor):
    try:
        return os.fstat(descriptor) is not None
    except OSError:
        return False

before = [is_open(number) for number in range(3)]
for manager in (results_alone, native_output_dropped):
    with manager():
        os.write(1, b"noise\\n")  # goes nowhere else: not into the next file that is opened
        with open({str(tmp_path / "file")!r}, "wb") as file:
            os.write(1, b"noise\\n")
    assert os.stat({str(tmp_path / "file")!r}).st_size == 0
    assert [is_open(number) for number in range(3)] == before
print("result")
"""
    code, out, err = in_a_process(script, redirect=closed)
    assert code == 0, err
    assert out == ("result\n" if closed == "2>&-" else "")
    assert err == ("noise\n" * 2 if closed == ">&-" else "")


def test_results_that_cannot_be_written_are_told_once() -> None:
    script = """
import sys
from moac_runtime.host.streams import results_alone

try:
    with results_alone():
        print("result")
except OSError as error:
    print(error.strerror, file=sys.stderr)
"""
    code, _, err = in_a_process(script, redirect="> /dev/full")
    assert (code, err) == (0, "No space left on device\n")


def test_a_capture_of_python_s_own_stays(capsys: Capture) -> None:
    before = sys.stdout
    with results_alone():
        assert sys.stdout is before
        print("result")
    assert capsys.readouterr().out == "result\n"


def test_threads_put_the_descriptor_back(capfd: Capture) -> None:
    def redirect() -> None:
        for _ in range(200):
            with native_output_dropped():
                os.write(1, b"noise\n")

    threads = [threading.Thread(target=redirect) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(1, b"result\n")
    assert capfd.readouterr() == ("result\n", "")
