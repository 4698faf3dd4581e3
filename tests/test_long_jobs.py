"""A compile that is killed, finds the disk full, is not alone, or finds its past damaged.

Whatever happens, the target is absent or whole, a failure is one sentence, and the next run gives
the package that an untroubled one gives, byte for byte, without doing again what was kept.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest
from cpu_kernels import needs_avx2, needs_compiler
from faults import Driver, Ended
from tiny import CONTEXT, options, plan_options

from moac.packaging.build_record import BUILD
from moac.store.atomic import PARTIAL
from moac_runtime.package.artifact import open_artifact

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="faults.c is for Linux"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="faults.c needs a C compiler"),
]

SEED = int(os.environ.get("MOAC_FAULT_SEED", "0"))
FEW, SOME, MANY = 2, 8, 30
LAST_CALLS = 12  # sealing, publishing and cleaning up
Files = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Job:
    """A compile that can be run again and again. `files`: of its package; `calls` that write."""

    driver: Driver
    checkpoint: Path
    choices: tuple[str, ...]
    files: Files
    calls: int
    seconds: float

    def run(self, folder: Path, *more: str, **fault: object) -> Ended:
        """Compile into `folder/out` with the work folder `folder/work`."""
        return self.driver.run(*self.words(folder, *more), folder=folder, **fault)

    def words(self, folder: Path, *more: str) -> tuple[object, ...]:
        """The command line."""
        places = ("-o", folder / "out", "--work-dir", folder / "work")
        return ("compile", self.checkpoint, *places, *self.choices, *more)


def files_of(package: Path) -> Files:
    """Every file's bytes but those of `build.json`, by name."""
    found = {str(p.relative_to(package)): p for p in package.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != BUILD}


def kept(folder: Path) -> dict[str, int]:
    """What the work folder holds, by name, each with the number of its file."""
    work = folder / "work"
    paths = work.iterdir() if work.exists() else ()
    return {p.name: p.stat().st_ino for p in paths if not p.name.startswith(PARTIAL)}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    made = Driver(tmp_path_factory.mktemp("driver"))
    yield made
    made.close()


def job(driver: Driver, checkpoint: Path, folder: Path, choices: list[str]) -> Job:
    """Run it once untroubled to see what it makes, and once more, warm, for how long it takes."""
    trial = Job(driver, checkpoint, tuple(choices), {}, 0, 0.0)
    ended = trial.run(folder / "first", tells_modules=True)
    assert ended.code == 0, ended.stderr
    driver.warm(ended.modules)
    again = trial.run(folder / "second")
    assert again.code == 0, again.stderr
    assert again.calls is not None
    files = files_of(folder / "first/out")
    assert files_of(folder / "second/out") == files
    return Job(driver, checkpoint, tuple(choices), files, again.calls, again.seconds)


@pytest.fixture(scope="module")
def tiny_job(
    driver: Driver,
    tiny_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    checkpoint = tiny_checkpoint("llama", max_position_embeddings=CONTEXT)
    return job(driver, checkpoint, tmp_path_factory.mktemp("job"), options())


@pytest.fixture(scope="module")
def kernels_job(
    driver: Driver,
    tiny_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    """The same with native kernels, so that a compiler of C++ is at work, too."""
    checkpoint = tiny_checkpoint("llama", max_position_embeddings=CONTEXT)
    choices = [*plan_options(), "--target", "torch,cpu:avx2"]
    return job(driver, checkpoint, tmp_path_factory.mktemp("kernels"), choices)


def older_package(tiny_job: Job, folder: Path) -> Files:
    """Have another whole package stand at the target."""
    out = folder / "out"
    for name, data in tiny_job.files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    (out / "notes.txt").write_text("of the older one")
    return files_of(out)


def goes_on(job: Job, folder: Path, before: Files | None) -> None:
    """The target is whole or absent, and the next run makes the package, doing nothing twice."""
    out = folder / "out"
    found = files_of(out) if out.exists() else None
    assert found in (before, job.files)
    if found is not None:
        open_artifact(out)
    held = kept(folder)
    ended = job.run(folder, "--force")
    assert ended.code == 0, ended.stderr
    assert files_of(out) == job.files
    assert sorted(path.name for path in folder.iterdir()) == ["out", "work"]
    assert not list((folder / "work").glob(f"{PARTIAL}*"))
    now = kept(folder)
    assert {name: now.get(name) for name in held} == held
    assert "is made again" not in ended.stderr


# ---- killed


def killed_at_random(job: Job, tmp_path: Path, count: int) -> None:
    """`count` kills while it is at work; every second time an older package stands there."""
    dice, killed, tries = random.Random(SEED), 0, 0
    while killed < count:
        tries += 1
        assert tries <= 4 * count, "most compiles had ended before they were killed"
        folder = tmp_path / str(tries)
        folder.mkdir()
        before = older_package(job, folder) if tries % 2 else None
        ended = job.run(folder, "--force", killed_after=dice.uniform(0, job.seconds))
        assert ended.code in (0, -9), ended.stderr
        killed += ended.code == -9
        goes_on(job, folder, before)
        shutil.rmtree(folder)
    print(f"{killed} kills in {tries} runs, seed {SEED}")


def test_a_kill_at_any_moment(tiny_job: Job, tmp_path: Path) -> None:
    killed_at_random(tiny_job, tmp_path, FEW)


def test_thirty_kills_at_random_moments(tiny_job: Job, tmp_path: Path) -> None:
    killed_at_random(tiny_job, tmp_path, MANY)


@needs_compiler
@needs_avx2
def test_kills_while_kernels_are_built(kernels_job: Job, tmp_path: Path) -> None:
    killed_at_random(kernels_job, tmp_path, SOME)


def killed_before(job: Job, tmp_path: Path, calls: list[int]) -> None:
    for number in calls:
        folder = tmp_path / str(number)
        folder.mkdir()
        before = older_package(job, folder) if number % 2 else None
        ended = job.run(folder, "--force", mode="kill", at=number)
        assert ended.code == -9, ended.stderr
        goes_on(job, folder, before)
        shutil.rmtree(folder)
    print(f"{len(calls)} kills, each before one of {job.calls} calls that write")


def spread(job: Job, count: int) -> list[int]:
    """Calls spread evenly over a run, from the first to the last."""
    return sorted({round(i * (job.calls - 1) / (count - 1)) for i in range(count)})


def test_a_kill_before_a_call_that_writes(tiny_job: Job, tmp_path: Path) -> None:
    killed_before(tiny_job, tmp_path, [tiny_job.calls // 3, tiny_job.calls - 3])


def test_a_kill_before_each_of_the_calls_that_publish(tiny_job: Job, tmp_path: Path) -> None:
    last = range(tiny_job.calls - LAST_CALLS, tiny_job.calls)
    killed_before(tiny_job, tmp_path, sorted({*spread(tiny_job, MANY), *last}))


# ---- a full disk


def full_from(job: Job, tmp_path: Path, calls: list[int]) -> None:
    """The disk is full from each of these calls on: one sentence, and nothing half-written."""
    failed = 0
    for number in calls:
        folder = tmp_path / str(number)
        folder.mkdir()
        before = older_package(job, folder) if number % 2 else None
        ended = job.run(folder, "--force", mode="full", at=number)
        if ended.code == 0:  # all that was left to do was to remove
            assert files_of(folder / "out") == job.files
        else:
            failed += 1
            told_in_a_sentence(ended)
            assert (files_of(folder / "out") if (folder / "out").exists() else None) == before
            assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
            assert not list((folder / "work").glob(f"{PARTIAL}*"))
        goes_on(job, folder, before)
        shutil.rmtree(folder)
    print(f"full from {len(calls)} of {job.calls} calls on, told {failed} times")


def told_in_a_sentence(ended: Ended) -> None:
    assert ended.code == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert os.strerror(errno.ENOSPC) in last or "does not fit on the disk" in last, last


def test_a_disk_that_is_full_at_some_point(tiny_job: Job, tmp_path: Path) -> None:
    full_from(tiny_job, tmp_path, spread(tiny_job, 4)[1:])


def test_a_disk_that_is_full_at_any_stage(tiny_job: Job, tmp_path: Path) -> None:
    last = range(tiny_job.calls - LAST_CALLS, tiny_job.calls)
    full_from(tiny_job, tmp_path, sorted({*spread(tiny_job, 60), *last}))


@needs_compiler
@needs_avx2
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_of_few_bytes(kernels_job: Job, tmp_path: Path) -> None:
    """A real one, of every size from none to almost enough, which fills up under g++ as well."""
    disk = tmp_path / "disk"
    disk.mkdir()
    needed = sum(map(len, kernels_job.files.values()))
    failed = 0
    for part in range(1, 17):
        mount(disk, part * needed // 8)
        try:
            ended = kernels_job.run(disk, "--force")
            if ended.code:
                failed += 1
                told_in_a_sentence(ended)
                assert not (disk / "out").exists()
                assert not [path.name for path in disk.iterdir() if path.name.startswith(".")]
            else:
                assert files_of(disk / "out") == kernels_job.files
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    assert 4 <= failed <= 15
    print(f"16 disks, {failed} of them too small")


def mount(disk: Path, size: int) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("this host mounts no tmpfs")


# ---- several at once


def side_by_side(job: Job, folder: Path, *more: str) -> list[Ended]:
    """Two compiles to one target and from one work folder, at once."""
    asked = (job.words(folder, *more), {"folder": str(folder)})
    return job.driver.together([asked, asked])


def test_two_compiles_to_one_target(tiny_job: Job, tmp_path: Path) -> None:
    first, second = sorted(side_by_side(tiny_job, tmp_path), key=lambda ended: ended.code)
    assert first.code == 0, first.stderr
    assert second.code in (1, 2), second.stderr
    assert "already exists" in second.stderr.splitlines()[-1] or "File exists" in second.stderr
    assert "Traceback" not in second.stderr
    goes_on(tiny_job, tmp_path, tiny_job.files)


def test_two_compiles_that_both_replace_it(tiny_job: Job, tmp_path: Path) -> None:
    before = older_package(tiny_job, tmp_path)
    for ended in side_by_side(tiny_job, tmp_path, "--force"):
        assert ended.code == 0, ended.stderr
    assert files_of(tmp_path / "out") == tiny_job.files
    goes_on(tiny_job, tmp_path, before)


# ---- its past


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :]


def of_another_version(data: bytes) -> bytes:
    return json.dumps({"version": 99, "result": [1, 2, 3]}).encode()


def empty(data: bytes) -> bytes:
    return b""


def test_a_damaged_work_folder_is_made_again(tiny_job: Job, tmp_path: Path) -> None:
    assert tiny_job.run(tmp_path).code == 0
    results = [path for path in sorted((tmp_path / "work").iterdir()) if path.is_file()]
    assert len(results) > 20
    damages = (cut, flipped, of_another_version, empty)
    for path, damage in zip(results, cycle(damages), strict=False):
        path.write_bytes(damage(path.read_bytes()))
    ended = tiny_job.run(tmp_path, "--force")
    assert ended.code == 0, ended.stderr
    assert files_of(tmp_path / "out") == tiny_job.files
    assert ended.stderr.count("; it is made again\n") == len(results)


# ---- its clock


def test_a_clock_that_jumps(tiny_job: Job, tmp_path: Path) -> None:
    ended = tiny_job.run(tmp_path, clock_jumps=1)
    assert ended.code == 0, ended.stderr
    assert files_of(tmp_path / "out") == tiny_job.files
    took = json.loads((tmp_path / "out" / BUILD).read_text())["seconds"]
    assert all(0 <= seconds < 600 for seconds in took.values())
    times = re.findall(r"(-?\d+) (s|min|h|d)\b", ended.stderr)
    assert all(int(count) >= 0 and unit in ("s", "min") for count, unit in times)
