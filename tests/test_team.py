"""The thread team of the CPU kernels under stress, natively and under the thread sanitizer.

`make test-race` runs the long ones too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from moac_kernels.cpu_build import INSTRUCTION_SETS, SOURCES, build_obstacle, find_compiler
from moac_runtime.backends.cpu.library import INSTRUCTION_SETS as FEATURES
from moac_runtime.backends.cpu.library import host_features

pytestmark = pytest.mark.skipif(
    build_obstacle() is not None, reason=build_obstacle() or "there is a compiler"
)

TESTS = Path(__file__).parent
FLAGS = ("-std=c++17", "-O2", "-g", "-pthread")
SANITIZER = "-fsanitize=thread"
SLEEPY = ("-DPHASE_SPINS=2", "-DIDLE_SPINS=2")  # threads that soon sleep until the bell
HANG_S = 20  # nothing ends for so long; a step takes milliseconds

Build = Callable[..., Path]


@cache
def sanitizer_obstacle() -> str | None:
    """Why nothing runs under the thread sanitizer here, None where it does."""
    with tempfile.TemporaryDirectory(prefix="moac-race-") as folder:
        program = Path(folder, "nothing")
        compiler = [find_compiler() or "c++", SANITIZER, "-x", "c++", "-", "-o", str(program)]
        built = subprocess.run(compiler, input="int main() {}", capture_output=True, text=True)
        if not built.returncode and not subprocess.run([program], capture_output=True).returncode:
            return None
    return "the thread sanitizer does not run here"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build(driver, *flags, sources=SOURCES)`: a driver of this folder, built once."""
    made: dict[object, Path] = {}

    def make(driver: str, *flags: str, sources: Path = SOURCES) -> Path:
        key = (driver, flags, sources)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("race") / driver
            include = ("-I", str(sources), "-I", str(TESTS))
            source = str(TESTS / f"{driver}.cpp")
            compiler = find_compiler() or "c++"
            done = subprocess.run(
                [compiler, *FLAGS, *flags, *include, source, "-o", str(made[key])],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
        return made[key]

    return make


def run(
    driver: Path, amount: int, *, threads: int = 5, seed: int = 1, patience: int = HANG_S
) -> subprocess.CompletedProcess[str]:
    """A driver's run, ended by itself where it hangs."""
    arguments = map(str, (amount, threads, seed, patience))
    return subprocess.run([str(driver), *arguments], capture_output=True, text=True, timeout=3600)


def holds(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.fixture(
    params=[(), (SANITIZER,), SLEEPY, (SANITIZER, *SLEEPY)],
    ids=["native", "sanitizer", "sleepy", "sleepy sanitizer"],
)
def flags(request: pytest.FixtureRequest) -> tuple[str, ...]:
    chosen: tuple[str, ...] = request.param
    if SANITIZER in chosen and sanitizer_obstacle():
        pytest.skip(sanitizer_obstacle() or "")
    return chosen


def test_every_task_runs_once_and_after_the_phase_before(
    build: Build, flags: tuple[str, ...]
) -> None:
    holds(run(build("team_race", *flags), 60_000))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 8])
def test_a_million_phases(build: Build, flags: tuple[str, ...], threads: int) -> None:
    holds(run(build("team_race", *flags), 1_000_000, threads=threads, seed=100, patience=120))


@pytest.mark.parametrize("rounds", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_whole_steps_of_many_threads_give_the_logits_of_one(build: Build, rounds: int) -> None:
    if not FEATURES["avx2"] <= host_features():
        pytest.skip("this processor runs no CPU kernels")
    flags = (*SLEEPY, *INSTRUCTION_SETS["avx2"], "-O1")
    checked = () if sanitizer_obstacle() else (SANITIZER,)
    holds(run(build("engine_race", *checked, *flags), rounds))


# Faults put into team.h one at a time, each with what the driver must say of it.
FAULTS = {
    "the total is read once the task is counted": (
        "    const int64_t total = at.total;",
        "    const int64_t &total = at.total;",
        "the clock went back",
    ),
    "a task of another step is claimed": (
        "open >> 32 == (step & 0xffffffff) && (uint32_t)open",
        "(uint32_t)open",
        "ran a task of step|ran twice|the clock went back",
    ),
    "the 32 bits of a step are compared with all of it": (
        "open >> 32 == (step & 0xffffffff)",
        "open >> 32 == step",
        "a hang",
    ),
    "phases of no tasks are waited for": (
        "while (phase < num_phases && !phases[phase].total) phase++;",
        "",
        "a hang",
    ),
    "the end of the team is looked for before the step": (
        "    const uint64_t newest = ",
        "    if (__atomic_load_n(&closing, __ATOMIC_SEQ_CST)) return CLOSED;\n"
        "    return __atomic_load_n(&step, __ATOMIC_SEQ_CST);\n"
        "    const uint64_t newest = ",
        "a hang",
    ),
    "the bell is heard after the word was read": (
        "sleep_while(&bell, heard)",
        "sleep_while(&bell, __atomic_load_n(&bell, __ATOMIC_SEQ_CST))",
        "a hang",
    ),
    "the next phase begins at once": (
        "    team.wait(&team.clock, step * team.num_phases + phase, PHASE_SPINS);",
        "    team.wait(&team.clock, step * team.num_phases, PHASE_SPINS);",
        "had not run when it was over|the clock went back",
    ),
}


# the others take as long as a hang takes to be told
ALWAYS = ("the total is read once the task is counted", "a task of another step is claimed",
          "the end of the team is looked for before the step")  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=() if fault in ALWAYS else pytest.mark.slow) for fault in FAULTS],
)
def test_the_driver_finds_a_fault(build: Build, tmp_path: Path, fault: str) -> None:
    sound, faulty, told = FAULTS[fault]
    text = (SOURCES / "team.h").read_text(encoding="utf-8")
    assert text.count(sound) == 1
    (tmp_path / "team.h").write_text(text.replace(sound, faulty), encoding="utf-8")
    shutil.copyfile(SOURCES / "waiting.h", tmp_path / "waiting.h")
    done = run(build("team_race", *SLEEPY, sources=tmp_path), 1_000_000, patience=3)
    assert done.returncode == 1, done.stdout
    assert re.search(told, done.stderr), done.stderr
