"""Every parser with some hostile inputs; `make fuzz` brings as many as one likes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from guard import check_sentence
from targets import TARGETS

from moac_runtime.errors import MoacError

HERE = Path(__file__).parent
CASES = 12


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "request"])
def test_hostile_inputs_end_well_or_in_a_sentence(name: str, tmp_path: Path) -> None:
    target, refused = TARGETS[name](tmp_path), 0
    target.run(target.valid)
    for number in range(CASES):
        try:
            target.run(target.make(Random(f"0/{number}")))
        except MoacError as error:
            refused += 1
            check_sentence(str(error))
    assert refused


def fuzz(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, HERE / "fuzz.py", *map(str, words)], capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_the_driver_holds_a_parser_to_its_limits(name: str, tmp_path: Path) -> None:
    done = fuzz(name, "--cases", 200, "--found", tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["parser"], told["cases"]) == (name, 200)
    assert told["refused"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_parser_that_is_not_there() -> None:
    done = fuzz("nothing")
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("error: there is no parser nothing; choose from manifest, ")


# ---- what the guard finds

_PROGRAM = """
import os, sys, time
from pathlib import Path
import guard as limits
from guard import Broken, Guard, Target
from moac_runtime.errors import MoacError

def later():
    until = time.process_time() + 1
    while time.process_time() < until: pass

def run(data):
    if data == b"refused": raise MoacError("no")
    exec(data, {"MoacError": MoacError, "later": later})

limits.SECONDS = 0.5
folder = Path(sys.argv[1]).resolve()
os.chdir(folder)
guard = Guard(Target(b"", lambda rng: b"", run), folder)
guard.limit_memory()
guard.check(b"refused")
guard.check(b"open('a', 'w').close()")
try:
    guard.check(sys.argv[2].encode())
except Broken as error:
    print(error)
except Exception as error:
    print(repr(error))
else:
    print("nothing")
assert guard.tally.accepted >= 1 and guard.tally.cases >= 2
"""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("pass", "nothing"),
        ("open('/etc/passwd').close()", "it opened ['open /etc/passwd']"),
        ("open('../x', 'w').close()", "it opened ['open "),
        ("import os; os.symlink('a', '../y')", "it opened ['os.symlink "),
        ("import sys; sys.stderr.write('x'); sys.stderr.flush()", "it printed b'x'"),
        ("import os; os.write(2, b'panicked')", "it printed b'panicked'"),
        ("raise ValueError('x')", "ValueError('x')"),
        ("raise MoacError('a' * 10_000 + '.')", "no sentence"),
        ("raise MoacError(' ')", "no sentence"),
        ("bytearray(2**30 + 2**29)", "MemoryError()"),
        ("later()", "it took"),
    ],
)
def test_the_guard_finds_what_no_case_may_do(case: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, tmp_path / "in", case],
        env={"PYTHONPATH": f"{HERE}:{HERE.parents[1] / 'runtime'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
