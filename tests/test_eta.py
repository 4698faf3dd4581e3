"""The time left of a whole compile, under simulated clocks: how it grows, how far off it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from specs import plain_spec

from moac.lengths import Lengths
from moac.pipeline import work as work_module
from moac.pipeline.planner import sample_counts
from moac.pipeline.work import Forecast, Work
from moac.progress.cost import Kind
from moac.progress.eta import MOST_GROWTH, SETTLING, Steady, TimeLeft, Told
from moac.request import CompileRequest
from moac_kernels.cpu_build import build_key
from moac_runtime.package.spec import RopeSpec

# The shape of SmolLM2-135M, on a machine of 250 GFLOPS: its compile takes some ten minutes.
SPEC = plain_spec(
    **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_layers": 30},
    **{"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "tied_embeddings": True},
    **{"context": 8192, "rope": RopeSpec("default", 1e4, (1.0,) * 32)},
)
LENGTHS = Lengths((1024, 2048, 4096), 8192, 1536, 8192)


@pytest.fixture
def forecast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Forecast:
    monkeypatch.setattr(work_module, "measured_rate", lambda *_: 2.5e11)
    monkeypatch.setattr(work_module, "runnable_sets", lambda targets: ("avx512bf16", "avx2"))
    monkeypatch.setattr(work_module, "cpu_obstacle", lambda *_: None)
    request = CompileRequest(targets=("torch", "cpu"))
    checkpoint: Any = SimpleNamespace(spec=SPEC, dtype="bfloat16")
    counts = sample_counts(LENGTHS, request.measuring.samples)
    cpu = torch.device("cpu")
    return Forecast(checkpoint, request, LENGTHS, counts, "bfloat16", cpu, tmp_path)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Look:
    """A look at the display: seconds since the start, what it told, and what was really left."""

    at: float
    told: Told
    left: float
    whole: float


def steps(work: Work, rng: random.Random) -> Iterator[tuple[str, str, float]]:
    """Stage, kind and amount of every step, long ones first, kinds of a stage in turns."""
    for stage, amounts in work.stages.items():
        parts = []
        for kind, amount in amounts.items():
            count = 1 if kind in (Kind.LOAD, Kind.BUILD, Kind.WRITE, Kind.CHECK) else 12
            weights = sorted((rng.uniform(1, 6) for _ in range(count)), reverse=True)
            parts += [(i / count, kind, amount * w / sum(weights)) for i, w in enumerate(weights)]
        yield from ((stage, kind, amount) for _, kind, amount in sorted(parts))


def run(work: Work, speed: dict[str, float], *, noise: float = 0.0, seed: int = 0) -> list[Look]:
    """The display, looked at every second of a run where kinds are off by `speed`."""
    rng, clock = random.Random(seed), Clock()
    guesses = work.guesses
    found = [
        (stage, kind, amount, amount * guesses[kind] * speed[kind] * rng.uniform(1, 1 + noise))
        for stage, kind, amount in steps(work, rng)
    ]
    whole = sum(seconds for *_, seconds in found)
    left, steady = TimeLeft(work.stages, work.guesses, clock), Steady()
    looks: list[Look] = []
    stage = None
    for name, kind, amount, seconds in found:
        if name != stage:
            left.end()
            left.begin(name)
            stage = name
        left.start(kind, amount)
        end = clock.now + seconds
        while clock.now < end:
            estimate = left.seconds()
            assert estimate is not None
            told = steady.tell(estimate, clock.now)
            looks.append(Look(clock.now, told, whole - clock.now, whole))
            clock.now = min(clock.now + 1.0, end)
        left.finish()
    return looks


# ---- a whole compile, where what each kind takes was guessed wrong


MAIN = (Kind.ANSWER, Kind.MEASURE, Kind.BACKWARD, Kind.CHECK)


def speeds() -> list[dict[str, float]]:
    """The kinds that take long in all combinations of half, once and twice the guess."""
    return [
        dict.fromkeys(Kind, others) | dict(zip(MAIN, factors, strict=True))
        for factors in product((0.5, 1.0, 2.0), repeat=len(MAIN))
        for others in (0.5, 2.0)
    ]


def growth(looks: list[Look]) -> float:
    """The most that a time told from the first minute on is above one told before it."""
    told = [look.told.seconds for look in looks if look.at >= SETTLING]
    least = told[0]
    most = 1.0
    for seconds in told:
        most = max(most, seconds / least)
        least = min(least, seconds)
    return most


def test_the_time_left_of_a_compile_never_grows_by_more_than_a_quarter(forecast: Forecast) -> None:
    work = forecast.compile()
    for speed in speeds():
        looks = run(work, speed, noise=0.3)
        assert looks[-1].whole > 4 * SETTLING
        assert growth(looks) <= MOST_GROWTH, speed


def test_it_is_right_to_a_factor_of_one_and_a_half(forecast: Forecast) -> None:
    work = forecast.compile()
    for speed in speeds():
        for look in run(work, speed, noise=0.3):
            # the last seconds are told in whole steps that may have to be guessed still
            if look.at > look.whole / 3 and look.left > 10:
                ratio = look.told.seconds / look.left
                assert 1 / 1.5 <= ratio <= 1.5, (speed, look)
                assert not look.told.more


def test_it_counts_all_stages_from_the_start(forecast: Forecast) -> None:
    looks = run(forecast.compile(), dict.fromkeys(Kind, 1.0))
    assert looks[0].told.seconds == pytest.approx(looks[0].left, rel=0.3)
    told = [look.told.seconds for look in looks]
    assert max(later / sooner for sooner, later in pairwise(told)) <= 1.05


def test_a_machine_that_slows_down_is_told_as_more(forecast: Forecast) -> None:
    clock, steady = Clock(), Steady()
    left = TimeLeft({"all": {"kind": 400.0}}, {"kind": 1.0}, clock)
    left.begin("all")
    told = []
    for number in range(400):
        with_neighbours = 5.0 if number >= 150 else 1.0
        left.start("kind", 1.0)
        clock.now += with_neighbours
        left.finish()
        told.append(steady.tell(left.seconds() or 0.0, clock.now))
    shown = [one.seconds for one in told[60:]]
    assert max(later / min(shown[:i]) for i, later in enumerate(shown) if i) <= MOST_GROWTH
    assert any(one.more for one in told)
    assert not told[-1].more


@pytest.mark.parametrize("max_loss", [None, 0.1])
def test_the_work_has_the_stages_of_a_compile(forecast: Forecast, max_loss: float | None) -> None:
    from dataclasses import replace

    ahead = replace(forecast, request=CompileRequest(targets=("torch",), max_loss=max_loss))
    drafts = "refine" if max_loss is None else "bisect"
    planning = ["load", "rehearse", "calibrate", "profile", "predict", drafts]
    planning += ["optimise", "validate"]
    assert [*ahead.plan().stages] == planning
    assert [*ahead.compile().stages] == [*planning, "emit", "verify"]
    assert [*ahead.package(measured=True).stages] == ["load", "validate", "emit", "verify"]
    assert [*ahead.package(measured=False).stages] == ["load", "emit", "verify"]
    samples = {n: sum(kinds.values()) for n, kinds in forecast.counts.items()}
    profiled = sum(ahead.samples.values()) - sum(ahead.later.values())
    assert sum(samples.values()) - profiled == (0 if max_loss else 10)


def test_kernels_that_lie_in_the_work_folder_are_not_built_again(forecast: Forecast) -> None:
    assert [forecast.compile().stages[name][Kind.BUILD] for name in ("load", "emit")] == [1, 2]
    for name in ("avx512bf16", "avx512", "avx2"):
        (forecast.kept / f"cpu-{build_key([name])}").mkdir()
    assert [forecast.compile().stages[name][Kind.BUILD] for name in ("load", "emit")] == [0, 0]


# ---- one kind


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_kind_counts_as_guessed_until_it_has_run(clock: Clock) -> None:
    left = TimeLeft({"a": {"x": 2.0}, "b": {"y": 4.0}}, {"x": 10.0, "y": 10.0}, clock)
    assert left.seconds() == pytest.approx(60 * 1.25)
    left.begin("a")
    left.start("x", 1.0)
    clock.now = 30.0
    left.finish()
    # half of x is over, at 30 s a unit
    assert left.seconds() == pytest.approx(30 * 1.125 + 40 * 1.25)
    left.end()
    assert left.seconds() == pytest.approx(40 * 1.25)


def test_long_steps_count_as_long(clock: Clock) -> None:
    left = TimeLeft({"a": {"x": 110.0}}, {"x": 1.0}, clock)
    left.begin("a")
    left.start("x", 100.0)
    clock.now = 200.0
    left.finish()
    assert left.seconds() == pytest.approx(20 * (1 + 0.25 / 11))


def test_a_step_counts_down_while_it_runs_and_past_its_time(clock: Clock) -> None:
    left = TimeLeft({"a": {"x": 2.0}}, {"x": 10.0}, clock)
    left.begin("a")
    left.start("x", 1.0)
    clock.now = 4.0
    assert left.seconds() == pytest.approx(6 + 10 * 1.25)
    clock.now = 20.0  # it takes twice as long at least, and so will the other
    assert left.seconds() == pytest.approx(2 + 20 * 1.25)


def test_parts_of_a_step_tell_its_speed(clock: Clock) -> None:
    left = TimeLeft({"a": {"x": 4.0}}, {"x": 10.0}, clock)
    left.begin("a")
    left.start("x", 4.0)
    for number in range(1, 4):
        clock.now += 2.0
        left.part(number, 4)
    assert left.seconds() == pytest.approx(2.0)
    clock.now += 2.0
    left.part(4, 4)
    left.finish()
    assert left.seconds() == 0


def test_kept_results_are_done_at_once_and_tell_no_speed(clock: Clock) -> None:
    left = TimeLeft({"a": {"x": 9.0}, "b": {"x": 1.0}}, {"x": 10.0}, clock)
    left.begin("a")
    for _ in range(9):
        clock.now += 0.001
        left.passed("x", 1.0)
    assert left.seconds() == pytest.approx(10 * 1.25)


def test_a_failed_step_tells_nothing(clock: Clock) -> None:
    left = TimeLeft({"a": {"x": 1.0}}, {"x": 10.0}, clock)
    left.begin("a")
    left.start("x", 1.0)
    clock.now = 500.0
    left.drop()
    assert left.seconds() == pytest.approx(10 * 1.25)


def test_a_stage_says_what_it_has_to_do(clock: Clock) -> None:
    left = TimeLeft({"a": {"x": 100.0}}, {"x": 1.0}, clock)
    left.begin("a", {"x": 4.0})
    assert left.seconds() == pytest.approx(5.0)
    left.start("x", None)
    clock.now = 8.0
    left.finish()
    assert left.seconds() == 0


def test_without_guesses_nothing_is_told_before_each_kind_has_run(clock: Clock) -> None:
    left = TimeLeft({"a": {"x": 2.0, "y": 2.0}}, clock=clock)
    left.begin("a")
    for kind in ("x", "y"):
        assert left.seconds() is None
        left.start(kind, 1.0)
        clock.now += 3.0
        assert left.seconds() is None
        left.finish()
    assert left.seconds() == pytest.approx(6 * 1.125)


# ---- what is told


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "about 1 s"),
        (43.4, "about 43 s"),
        (59.8, "about 1 min"),
        (64.0, "about 1 min"),
        (203.0, "about 3 min 20 s"),
        (597.0, "about 10 min"),
        (1000.0, "about 17 min"),
        (5000.0, "about 83 min"),
    ],
)
def test_times_are_rounded_as_far_as_they_are_known(seconds: float, text: str) -> None:
    assert str(Steady().tell(seconds, 0.0)) == text


def test_rounding_never_passes_the_limit() -> None:
    rng = random.Random(0)
    for _ in range(300):
        steady, told = Steady(), []
        value = rng.uniform(1, 1500)
        for number in range(40):
            value *= rng.uniform(0.5, 1.8)
            told.append(steady.tell(value, SETTLING + number))
        for i, one in enumerate(told[1:], start=1):
            least = min(other.seconds for other in told[:i])
            assert one.seconds <= MOST_GROWTH * least
            assert one.seconds >= 1


def test_before_the_first_minute_is_over_anything_may_be_told() -> None:
    steady = Steady()
    assert steady.tell(30.0, 10.0) == Told(30)
    assert steady.tell(90.0, 59.0) == Told(90)
    assert steady.tell(80.0, 60.0) == Told(80)
    assert str(steady.tell(500.0, 70.0)) == "more than 1 min 40 s"
