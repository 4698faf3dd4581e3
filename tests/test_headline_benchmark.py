"""benchmarks/headline.py on a tiny model, and how it judges what was measured."""

from __future__ import annotations

from importlib import import_module
from math import exp
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_scripts import Run, tiny_run
from tiny import Compiled

from moac.evaluation.runner import Runner

headline = import_module("headline")
retrieval = import_module("claims.retrieval")
speed = import_module("claims.speed")
suite = import_module("claims.suite")
pages = import_module("claims.page")

Capture = pytest.CaptureFixture[str]
ORIGIN = {
    "date": "2026-11-28T10:00:00+00:00",
    "host": {"processor": "P", "cores": 2, "memory_gib": 4.0, "system": "S", "load_average": [0]},
    "versions": {"moac": "1", "torch": "2", "transformers": "3"},
    "model": "tiny",
}


def answers(length: int, budget: float, /, task: str = "passkey", **found: str) -> list[Any]:
    """Cases of a length by what each plan found of them, a digit a case."""
    told = [dict(zip(found, map(int, row), strict=True))
            for row in zip(*found.values(), strict=True)]  # fmt: skip
    return [
        {"task": task, "length": length, "budget": budget, "wording": "unseen", "seed": 0,
         "place": place, "score": score, "nll": score}
        for place, score in enumerate(told)
    ]  # fmt: skip


# ---- retrieval

FULL, MOST, HALF, NONE = "1" * 20, "1" * 18 + "00", "10" * 10, "0" * 20


def part(*groups: list[Any], **changes: Any) -> dict[str, Any]:
    cases = [case for group in groups for case in group]
    spans = [{"budget": c["budget"], "length": c["length"], "mean": {"moac": 64.0}} for c in cases]
    made = {"span": 64, "effort": "quick", "budgets": [0.5], "lengths": [128], "spans": spans}
    return {**ORIGIN, **made, "cases": cases, **changes}


AT_96 = answers(96, 64 / 96, dense=FULL, uniform=MOST)
AT_128 = answers(128, 0.5, dense=FULL, uniform=HALF, moac=FULL)
AT_256 = answers(256, 0.25, dense=FULL, uniform=HALF, moac=MOST)
AT_512 = answers(512, 0.125, dense=FULL, uniform=HALF, moac=HALF)


def reached(*groups: list[Any]) -> Any:
    claim, *_ = retrieval.claims(part(*groups))
    return claim


def test_a_plan_reaches_as_far_as_it_finds_nine_tenths_of_dense_s() -> None:
    told = reached(AT_96, AT_128, AT_256, AT_512).ours
    assert told.startswith("2.67x (")
    assert told.endswith("): 256 to 96 tokens")
    low, high = map(float, told.partition("(")[2].partition(")")[0].split(" to "))
    assert low < 256 / 96 < high == pytest.approx(4.0), "uniform may fall short of 96"


def test_what_is_lost_at_a_shorter_length_ends_the_reach() -> None:
    lost = answers(128, 0.5, dense=FULL, uniform=HALF, moac=HALF)
    assert reached(AT_96, lost, AT_256).ours.endswith(": 64 to 96 tokens")


def test_a_reach_to_the_longest_length_may_be_longer() -> None:
    told = reached(AT_96, AT_128, AT_256).ours
    assert told.startswith("at least 2.67x")
    assert told.endswith("256 and more to 96 tokens")
    both = answers(128, 0.5, dense=FULL, uniform=FULL, moac=FULL)
    assert reached(AT_96, both).ours == "not told: 128 and more to 128 and more tokens"


def test_lengths_at_which_dense_finds_next_to_nothing_tell_nothing() -> None:
    floor = answers(256, 0.25, dense=NONE, uniform=NONE, moac=NONE)
    claim = reached(AT_96, AT_128, floor)
    assert claim.ours.endswith("128 and more to 96 tokens")
    assert claim.note == "dense is near the floor at 256 tokens"
    nothing = answers(128, 0.5, dense=NONE, uniform=NONE, moac=NONE)
    assert reached(nothing).ours == "not told"


def test_what_is_found_at_equal_density_is_paired() -> None:
    _, claim = retrieval.claims(part(AT_96, AT_128, AT_256))
    assert claim.ours.startswith("2.00x (1.")
    assert claim.ours.endswith("): 100 to 50 %")
    assert "at 128 tokens, 20 cases" in claim.how, "of the lengths asked for alone"


# ---- the suite


def of_suite(*groups: list[Any]) -> dict[str, Any]:
    cases = [case for group in groups for case in group]
    return {**ORIGIN, "budget": 0.5, "effort": "quick", "lengths": [64], "cases": cases}


def seen(task: str, **found: str) -> list[Any]:
    return [{**c, "wording": "seen"} for c in answers(64, 0.5, task=task, **found)]


def texts(*pairs: tuple[float, float]) -> list[Any]:
    return [
        {"task": "nll", "length": 64, "budget": 0.5, "text": "prose", "seed": 0, "place": place,
         "nll": {"dense": dense, "uniform": dense, "moac": moac}}
        for place, (dense, moac) in enumerate(pairs)
    ]  # fmt: skip


UNSEEN = answers(64, 0.5, dense=FULL, uniform=HALF, moac=MOST)
REGISTER = seen("longeval", dense=HALF, uniform=NONE, moac="1000" * 5)
HARD = seen("ruler_vt", dense="1" + "0" * 19, uniform=NONE, moac=NONE)
TEXT = texts((2.0, 2.01), (3.0, 3.03))


def test_the_largest_drop_is_of_unseen_tasks_first_and_of_none_near_the_floor() -> None:
    unseen, every = suite.claims(of_suite(REGISTER, HARD, UNSEEN, TEXT))
    assert unseen.ours.startswith("+10.0 (")
    assert "% (passkey); uniform: +50.0 (" in unseen.ours
    assert unseen.note == ""
    assert every.ours.startswith("+50.0 (")
    assert "% (longeval); uniform: +100.0 (" in every.ours
    assert every.note == "dense is near the floor, so left out: ruler_vt"


def test_a_drop_of_text_is_the_rise_of_perplexity() -> None:
    (drop,) = suite.drops(of_suite(TEXT), "moac")
    assert drop.value == pytest.approx(exp(0.02) - 1)
    assert drop.unseen
    assert drop.ci95[0] < drop.value < drop.ci95[1]


def test_a_gain_is_no_drop() -> None:
    (drop,) = suite.drops(of_suite(seen("longeval", dense=HALF, uniform=HALF, moac=FULL)), "moac")
    assert drop.value == -1.0
    assert not drop.unseen


def test_the_tasks_stand_in_the_page_unseen_first() -> None:
    told = suite.details(of_suite(REGISTER, HARD, UNSEEN, TEXT))
    order = [told.index(f"| {task} |") for task in ("passkey", "nll", "longeval", "ruler_vt")]
    assert order == sorted(order)
    assert told.splitlines()[-1].endswith("| yes |"), "near the floor"


# ---- memory and speed


def row(system: str, batch: int, ms: float, kv: int, peak: int) -> dict[str, Any]:
    return {"system": system, "batch": batch, "context": 64, "dtype": "float32", "density": 0.5,
            "prefill_s": 1.0, "decode_ms_p50": ms, "decode_ms_blocks": [ms * 0.9, ms * 1.1],
            "tokens_per_s": batch * 1e3 / ms, "kv_bytes": kv << 20,
            "peak_bytes": peak << 20}  # fmt: skip


def run_of(*rows: dict[str, Any]) -> dict[str, Any]:
    machine = {"threads": 2}
    return {"origin": ORIGIN, "rows": rows, "machine": machine, "read_bandwidth_gbs": 10.0}


def test_memory_is_told_of_kv_alone_with_weights_and_in_all() -> None:
    run = run_of(row("moac", 8, 1, 50, 400), row("dense", 8, 1, 100, 500))
    told = speed.memory_claims({**ORIGIN, "weight_bytes": 150 << 20, "runs": [run]})
    assert [claim.ours for claim in told] == [
        "2.00x: 100.0 to 50.0 MiB",
        "1.25x: 250.0 to 200.0 MiB",
        "1.25x: 500.0 to 400.0 MiB",
    ]


def test_throughput_compares_each_at_its_own_batch() -> None:
    steps = {"moac": 10.0, "hf": 40.0, "hf-static": 20.0, "dense": 12.5}
    full = run_of(*(row(name, 4, ms, 1, 1) for name, ms in steps.items()))
    sparse = run_of(row("moac", 8, 16.0, 1, 1), row("uniform", 8, 20.0, 1, 1))
    told = list(speed.throughput_claims({**ORIGIN, "kv_mib": 1, "runs": [full, sparse]}))
    assert [claim.ours.partition(":")[0] for claim in told] == [
        "5.00x (4.09 to 6.11)",
        "2.50x (2.05 to 3.06)",
        "1.56x (1.28 to 1.91)",
        "1.25x (1.02 to 1.53)",
    ]
    assert "500.0 to 100.0 tokens/s" in told[0].ours
    assert all("on a CPU" in claim.what and claim.note == "a CPU, not a GPU" for claim in told)
    assert "8 rows of ours and 4 of the other" in told[0].how


# ---- the command

QUICK = ("--quick", "--against", "hf")


@pytest.fixture
def run(
    tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> Run:
    return tiny_run(
        *(headline.main, tiny_package, tmp_path, monkeypatch, capsys), efforts=("quick",)
    )


def test_parts_run_alone_are_kept_and_told_together(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, printed, asked = run(*QUICK, "--only", "memory")
    assert asked == ["plan", "compile"]
    assert list(found["parts"]) == ["memory"]
    assert "KV memory, dense's over ours" in printed

    found, printed, asked = run(*QUICK, "--only", "retrieval")
    assert asked == ["plan"], "the first budget's plan and the package stand"
    assert list(found["parts"]) == ["retrieval", "memory"]
    assert printed == (tmp_path / "out.md").read_text()
    _check_spans(found["parts"]["retrieval"])

    def never(*given: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(Runner, "replies", never)
    monkeypatch.setattr(speed, "run_bench", never)
    again, _, asked = run(*QUICK, "--only", "retrieval,memory")
    assert asked == []
    assert again["parts"]["memory"]["runs"] == found["parts"]["memory"]["runs"]
    assert again["parts"]["memory"]["date"] == found["parts"]["memory"]["date"]
    assert again["parts"]["retrieval"]["cases"] == found["parts"]["retrieval"]["cases"]
    with pytest.raises(AssertionError, match="measured twice"):
        run(*QUICK, "--only", "memory", "--again")
    with pytest.raises(AssertionError, match="measured twice"):
        run(*QUICK, "--only", "memory", "--context", "40")
    result = (tmp_path / "out.json").read_bytes()
    assert run("--table-only")[1] == pages.page(again)
    assert (tmp_path / "out.json").read_bytes() == result


def _check_spans(found: dict[str, Any]) -> None:
    """Every plan has the mean span that it is compared at."""
    told = {(s["length"], method): tokens for s in found["spans"]
            if round(found["span"] / s["budget"]) == s["length"]
            for method, tokens in s["mean"].items()}  # fmt: skip
    assert set(told) == {(480, "uniform"), (640, "uniform"), (640, "moac"),
                         (1280, "uniform"), (1280, "moac")}  # fmt: skip
    assert all(300 < tokens <= 320 for tokens in told.values())


def test_throughput_is_measured_at_the_batch_that_memory_holds(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of 512 tokens takes 256 KiB, and half of that under the plan."""
    asked: list[Any] = []

    def bench(request: Any) -> Any:
        asked.append(request)
        rows = [row(name, request.batches[0], 10.0, 1, 1) for name in ("moac", *request.against)]
        return SimpleNamespace(to_json=lambda: {**run_of(*rows), "origin": ORIGIN})

    monkeypatch.setattr(speed, "run_bench", bench)
    more = ("--only", "throughput", "--context", "504", "--most-rows")
    _, printed, _ = run("--quick", *more, "64")
    assert [request.batches for request in asked] == [(4,), (8,)]
    assert [request.against for request in asked] == [("hf", "hf-static", "dense"), ("uniform",)]
    for name in ("growing cache", "static cache", "uniform window", "nothing dropped"):
        assert name in printed
    asked.clear()
    run("--quick", *more, "6")
    assert [request.batches for request in asked] == [(6,)], "the other is kept"


@pytest.mark.slow
def test_everything_at_once(run: Run) -> None:
    found, printed, _ = run("--quick", "--context", "504")
    speeds = [run["rows"] for run in found["parts"]["throughput"]["runs"]]
    rows = {(r["system"], r["batch"]): r for r in (*speeds[0], *speeds[1])}
    assert all(r["kv_bytes"] <= 1 << 20 for (name, _), r in rows.items() if name != "hf")
    assert list(found["parts"]) == ["retrieval", "suite", "memory", "throughput"]
    tasks = {case["task"] for case in found["parts"]["suite"]["cases"]}
    assert len(tasks) == 14, "pass keys, registers, eleven of RULER's, text"
    assert "static cache, compiled" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "speed"], "there is no part 'speed'; choose from retrieval, suite, memory"),
        (["--against", "vllm"], "there is no system 'vllm'; choose from moac, hf, hf-static"),
        (["--budgets", "0"], "the budget is 0, expected above 0"),
        (["--effort", "slow"], "there is no effort 'slow'; choose from quick, standard"),
        (["--stretch", "1"], "--stretch holds 1, expected numbers above 1"),
        (["--span", "1024"], "the length 4096 is beyond the model's context of 2048 tokens"),
        (["--context", "4000"], "the length 4008 is beyond the model's context of 2048 tokens"),
        (["--kv-mib", "0"], "--kv-mib must be 1 or more, got 0"),
        (["--cases", "0"], "samples is 0, expected at least 1"),
    ],
)
def test_a_wrong_request_is_told_before_any_work(
    tiny_package: Compiled, tmp_path: Path, capsys: Capture, arguments: list[str], sentence: str
) -> None:
    own = ["--work-dir", str(tmp_path), "--out", str(tmp_path / "out.json")]
    assert headline.main([str(tiny_package.checkpoint), "--quick", *own, *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    assert list(tmp_path.iterdir()) == []
