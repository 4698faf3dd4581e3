"""benchmarks/efforts.py on a tiny model, and how it pools cases and judges what they tell."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from benchmark_scripts import ROOT, Run, tiny_run
from tiny import Compiled, plan_options

from moac.evaluation.intervals import share_interval
from moac.evaluation.runner import Runner
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.plan import Plan

efforts = import_module("efforts")
made = import_module("made")
pooled = import_module("pooled")

Capture = pytest.CaptureFixture[str]


# ---- pooling


def case(place: int, scores: dict[str, float], **changes: Any) -> dict[str, Any]:
    made = {"budget": 0.5, "seed": 0, "length": 64, "wording": "unseen", "task": "passkey"}
    return {**made, "place": place, "score": scores, "nll": scores, **changes}


def answers(base: str, quick: str, thorough: str, **changes: Any) -> list[dict[str, Any]]:
    """Cases by what each plan found of them, a digit a case."""
    rows = zip(base, quick, thorough, strict=True)
    return [
        case(i, {"uniform": int(b), "quick": int(q), "thorough": int(t)}, **changes)
        for i, (b, q, t) in enumerate(rows)
    ]


def kept(cases: Sequence[dict[str, Any]], wanted: float = 0.85) -> Any:
    return pooled.kept_gain(cases, "quick", "thorough", baseline="uniform", wanted=wanted)


def test_a_case_asked_at_two_budgets_counts_once_with_its_mean() -> None:
    cases = answers("0000", "1100", "1110") + answers("0000", "1000", "1110", budget=0.25)
    figure = pooled.found(cases, "quick")
    assert (figure.value, figure.n) == (3 / 8, 4)
    assert figure.ci95 == share_interval([1, 0.5, 0, 0])


def test_cases_of_other_seeds_lengths_and_wordings_are_other_cases() -> None:
    cases = [c for changes in ({}, {"seed": 1}, {"length": 128}, {"wording": "seen"})
             for c in answers("00", "10", "11", **changes)]  # fmt: skip
    assert pooled.found(cases, "quick").n == 8


def test_the_gain_that_is_kept() -> None:
    found = kept(answers("1000000000", "1111111100", "1111111110"))
    assert (found.gain, found.reference_gain) == (pytest.approx(0.7), pytest.approx(0.8))
    assert found.ratio == pytest.approx(7 / 8)
    assert found.margin == pytest.approx(0.7 - 0.85 * 0.8)
    assert found.held is True
    assert found.n == 10
    assert found.ratio_ci95[0] < found.ratio <= found.ratio_ci95[1]
    assert kept(answers("1000000000", "1111111100", "1111111110"), wanted=0.88).held is False


def test_intervals_are_paired() -> None:
    """Plans that find the same cases keep all, whichever cases are drawn."""
    same = kept(answers("1010000000" * 5, "1111100000" * 5, "1111100000" * 5))
    assert same.ratio_ci95 == (1.0, 1.0)
    apart = kept(answers("1010000000" * 5, "1011100010" * 5, "1111100000" * 5))
    assert apart.ratio == 1.0
    assert apart.ratio_ci95[0] < 0.9 < 1.1 < apart.ratio_ci95[1]


def test_more_cases_narrow_the_interval() -> None:
    few, many = (kept(answers(*(row * n for row in ("1000", "1100", "1110")))) for n in (10, 160))
    widths = [f.margin_ci95[1] - f.margin_ci95[0] for f in (few, many)]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.1)


def test_what_varies_between_lengths_is_no_chance() -> None:
    """All of one length found and none of another: each length is drawn by itself."""
    cases = answers("0" * 6, "1" * 6, "1" * 6) + answers("0" * 6, "0" * 6, "0" * 6, length=128)
    found = kept(cases)
    assert (found.gain, found.margin_ci95) == (0.5, (pytest.approx(0.075), pytest.approx(0.075)))


def test_no_ratio_to_a_gain_that_is_none() -> None:
    none = kept(answers("1100", "1110", "1100"))
    assert (none.ratio, none.ratio_ci95, none.held) == (None, None, None)
    chance = kept(answers("1010", "1110", "1011"))
    assert chance.ratio == 1.0
    assert chance.ratio_ci95 is None, "a draw may leave no gain to divide by"


def test_a_loss_of_text_is_a_mean_of_kinds() -> None:
    def text(kind: str, place: int, dense: float, quick: float) -> dict[str, Any]:
        nll = {"dense": dense, "quick": quick}
        return case(place, {}, wording=None, text=kind, task="nll", nll=nll)

    cases = [text("prose", 0, 2.0, 2.1), text("code", 0, 1.0, 1.3), text("code", 1, 1.0, 1.1)]
    assert pooled.text_loss(cases, "dense").value == pytest.approx(1.5)
    less = pooled.text_loss(cases, "quick", less="dense")
    assert (less.value, less.n, less.ci95) == (pytest.approx(0.15), 3, None)


# ---- the work folder


def test_results_that_came_from_the_work_folder_are_told() -> None:
    before = {"a": ("profile", 1), "b": ("profile", 1), "c": ("loss", 1)}
    after = {**before, "a": ("profile", 2), "d": ("profile", 2), "e": ("loss", 3)}
    assert made._kept(before, after) == {
        "profile": {"kept": 1, "made": 1},
        "loss": {"kept": 0, "made": 1},
    }


# ---- the command

OPTIONS = ["--efforts", "quick,thorough", "--budgets", "0.5,0.25", "--lengths", "640",
           "--cases", "2", "--seen", "1", "--texts", "1"]  # fmt: skip


class Cut(Exception):
    """What stops a run in the middle."""


@pytest.fixture
def run(
    tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> Run:
    efforts_here = ("quick", "thorough")
    made_run = tiny_run(
        *(efforts.main, tiny_package, tmp_path, monkeypatch, capsys), efforts=efforts_here
    )
    return lambda *more: made_run(*OPTIONS, *more)


def test_one_command_plans_packages_evaluates_and_goes_on(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replies = Runner.replies
    runs: list[int] = []

    def cut(self: Runner, *given: Any, **options: Any) -> Any:
        runs.append(1)
        if len(runs) == 12:
            raise Cut
        return replies(self, *given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Runner, "replies", cut)
        with pytest.raises(Cut):
            run()
    partial = json.loads((tmp_path / "out.json").read_bytes())
    assert {(c["seed"], c["wording"]) for c in partial["cases"]} == {(0, "unseen"), (1, "unseen")}
    assert "## Pass keys found, unseen" in (tmp_path / "out.md").read_text()

    found, printed, asked = run()
    assert asked == [], "plans and package stand"
    assert printed == (tmp_path / "out.md").read_text()
    order = [printed.index(f"## {name}") for name in (
        "Plans", "How much of the gain is kept, unseen", "Pass keys found, unseen",
        "Pass keys found, seen", "How much of the gain is kept, seen", "Text")]  # fmt: skip
    assert order == sorted(order)
    _check_cases(found)
    _check_plans(found, tmp_path / "work")
    assert [row["method"] for row in found["criterion"]] == ["quick"]
    assert found["criterion"][0]["n"] == 4, "the unseen cases of both seeds, and no others"

    monkeypatch.setattr(Runner, "replies", None)
    monkeypatch.setattr(Runner, "text_losses", None)
    again, same, _ = run()
    assert again["cases"] == found["cases"], "nothing is run twice"
    shown = run("--table-only")[1]
    assert shown == same


def _check_cases(found: dict[str, Any]) -> None:
    def count(**asked: Any) -> int:
        return sum(all(c.get(k) == v for k, v in asked.items()) for c in found["cases"])

    for budget in (0.5, 0.25):
        for seed in (0, 1):
            asked = {"budget": budget, "seed": seed, "task": "passkey", "length": 640}
            assert count(**asked, wording="unseen") == 2
            assert count(**asked, wording="seen") == 1
        assert count(budget=budget, seed=0, task="nll") == 3
    assert len(found["cases"]) == 2 * (2 * (2 + 1) + 3)
    names = {"dense", "uniform", "quick", "thorough"}
    assert all(set(c["nll"]) == names for c in found["cases"])
    assert all(set(c["score"]) == names for c in found["cases"] if c["task"] == "passkey")
    half, quarter = (
        [c["nll"] for c in found["cases"] if (c["budget"], c["task"]) == (b, "passkey")]
        for b in (0.5, 0.25)
    )
    assert [c["dense"] for c in half] == [c["dense"] for c in quarter]
    assert all(a["uniform"] != b["uniform"] for a, b in zip(half, quarter, strict=True))


def _check_plans(found: dict[str, Any], work: Path) -> None:
    told = [(made["budget"], made["effort"]) for made in found["plans"]]
    assert told == [(0.5, "quick"), (0.5, "thorough"), (0.25, "quick"), (0.25, "thorough")]
    for made in found["plans"]:
        assert {"calibrate", "profile", "refine", "validate"} <= set(made["stages"])
        assert made["peak_memory_bytes"] > 1 << 20
        assert made["kept"]["calibration"]["kept"] > 0
        assert made["kept"]["profile"]["kept"] > 0
    assert any(made["kept"]["profile"]["made"] for made in found["plans"]), "drafts differ"
    like = open_artifact(work / "package-thorough", check="sizes").plan
    for budget in (0.5, 0.25):
        plan = Plan.from_json(json.loads((work / f"{budget:g}" / "uniform.json").read_text()))
        assert len({rule for layer in plan.rules for rule in layer}) == 1
        assert budget - like.block / 640 < plan.density(640) <= budget


def test_a_plan_is_made_again_for_other_options(run: Run) -> None:
    small = ("--budgets", "0.5", "--seeds", "0", "--seen", "0", "--texts", "0")
    assert run(*small)[2] == ["plan", "plan", "compile"]
    others = " ".join([*plan_options(), "--rules-per-layer", "1"])
    assert run(*small, "--planning", others)[2] == ["plan", "plan", "compile"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--efforts", "quick"], "--efforts compares two and more, the last of them the yardst"),
        (["--efforts", "quick,quick"], "two of the plans to compare bear the name quick"),
        (["--efforts", "quick,quik"], "there is no effort 'quik'; choose from quick, standard"),
        (["--budgets", "0.5,2"], "the budget is 2, expected above 0 and at most 1"),
        (["--lengths", "9999"], "the length 9999 is beyond the model's context of 2048 tokens"),
        (["--cases", "-1"], "samples is -1, expected at least 1"),
        (["--table-only"], "out.json cannot be read (No such file or directory); leave --table"),
    ],
)
def test_a_wrong_request_is_told_before_any_work(
    tiny_package: Compiled, tmp_path: Path, capsys: Capture, arguments: list[str], sentence: str
) -> None:
    own = ["--work-dir", str(tmp_path), "--out", str(tmp_path / "out.json")]
    assert efforts.main([str(tiny_package.checkpoint), *own, *arguments]) in (1, 2)
    err = capsys.readouterr().err
    assert sentence in err
    assert err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_results_of_another_benchmark_are_refused(tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "out.json"
    other.write_text('{"benchmark": "headline"}')
    assert efforts.main(["--table-only", "--out", str(other)]) == 1
    assert f"error: {other} holds no results of efforts.py" in capsys.readouterr().err


def test_a_moac_command_that_fails_ends_the_run(tmp_path: Path, capfd: Capture) -> None:
    with pytest.raises(Exception, match=r"moac plan failed \(exit code 1\)") as failed:
        made.run_moac(["plan", str(tmp_path), "--output", str(tmp_path / "plan.json")])
    assert type(failed.value).__name__ == "MoacError"
    assert "error: " in capfd.readouterr().err, "its own sentence came first"


# ---- every benchmark

SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_finds_all_that_it_imports(name: str) -> None:
    """What a script imports of moac moves at times, and nothing else would tell."""
    import_module(name)


def test_a_benchmark_tells_its_options() -> None:
    script = ROOT / "benchmarks" / "efforts.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--table-only" in done.stdout
