"""Effort: what each comes to, and what was given goes before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import Compiled, moac_command

from moac.effort import EFFORTS
from moac.lengths import choose_lengths
from moac.request import CompileRequest
from moac_runtime.errors import UsageError

SMALL = ("--sink", 16, "--block", 16, "--min-span", 32)


def test_the_standard_effort_is_the_default() -> None:
    assert CompileRequest().measuring == EFFORTS["standard"]
    assert CompileRequest().planning()["effort"] == "standard"
    assert CompileRequest().planning_given() == []
    assert CompileRequest(effort="standard").planning_given() == ["effort"]


def test_what_is_given_goes_before_the_effort() -> None:
    request = CompileRequest(effort="quick", samples=7)
    assert request.measuring.samples == 7
    assert request.measuring.plans == EFFORTS["quick"].plans
    assert request.planning()["samples"] == 7
    assert request.planning()["plans"] == EFFORTS["quick"].plans


def test_more_effort_measures_no_less() -> None:
    quick, standard, thorough = (EFFORTS[name] for name in ("quick", "standard", "thorough"))
    for less, more in ((quick, standard), (standard, thorough)):
        assert less.samples < more.samples
        assert less.plans <= more.plans
        assert less.drafts <= more.drafts
        assert less.longest <= more.longest


def test_an_effort_that_is_none() -> None:
    with pytest.raises(UsageError, match="there is no effort 'fast'; choose from quick"):
        CompileRequest(effort="fast")


@pytest.mark.parametrize(
    ("effort", "context", "gpu", "profiled"),
    [
        ("quick", 8192, False, (1024, 2048)),
        ("standard", 8192, False, (1024, 2048, 4096)),
        ("thorough", 8192, False, (1024, 2048, 4096)),
        ("quick", 131072, True, (2048, 4096)),
        ("standard", 131072, True, (2048, 4096, 8192)),
        ("quick", 1024, False, (256, 512)),
    ],
)
def test_lengths_follow_the_effort(
    effort: str, context: int, gpu: bool, profiled: tuple[int, ...]
) -> None:
    chosen = choose_lengths(
        None, context=context, block=64, min_span=128, gpu=gpu, effort=EFFORTS[effort]
    )
    assert chosen.profiled == profiled


def test_the_dry_run_names_what_an_effort_comes_to(
    tiny_package: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("plan", tiny_package.checkpoint, "-o", tmp_path / "p.json", *SMALL, "--dry-run")
    told = {}
    for effort in EFFORTS:
        assert moac_command(*asked, "--effort", effort, "--json") == 0
        stages = json.loads(capsys.readouterr().out)
        told[effort] = {stage["name"]: stage["work"] for stage in stages}
    assert told["quick"]["refine"].endswith("around 1 draft of the plan")
    assert told["standard"]["refine"].endswith("around 2 drafts of the plan")
    lengths = {effort: work["profile"].split(" at ")[1] for effort, work in told.items()}
    assert lengths["quick"] != lengths["standard"] == lengths["thorough"]
    assert told["quick"]["validate"] != told["thorough"]["validate"]


def test_a_package_says_which_effort_made_it(
    tiny_package: Compiled, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moac_command("inspect", tiny_package.package) == 0
    assert "\neffort    standard: profiled at 512, 768 tokens, " in capsys.readouterr().out
