"""Plans that give each KV head a span and a width, under a budget of bytes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import Capture, refused
from tiny import Compiled, moac_command, request

from moac import compile_model
from moac.pipeline.verify import verify
from moac.planning import HeadLayout, Objective, Problem, layerwise_plan, solve_weighted
from moac.planning.between import spend_between
from moac.planning.beyond import spend_beyond
from moac.planning.capacities import held_at, largest_share, over_budget
from moac.planning.problem import check_budget, plan_losses
from moac.planning.rules import candidate_rules, with_widths
from moac.planning.solver import SolverOptions
from moac.planning.uniform import matching_uniforms, reference_plan, uniform_plan
from moac_runtime.backends.cuda.session import CudaSession
from moac_runtime.backends.onnx.session import OnnxSession
from moac_runtime.backends.open import open_backend
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.errors import BudgetError, MoacError, UsageError
from moac_runtime.package.artifact import load_plan_record, open_artifact
from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule

KV = KvShape(16, 2)
BLOCK, MIN_SPAN, LENGTHS = 16, 32, (256, 512)
WIDTHS = (None, 8, 4)
NOISE = np.array([0.01, 10, 0.1, 1, 1, 0.03]).reshape(3, 2, 1)  # head by head


def layout_of(widths: tuple[int | None, ...] = WIDTHS, layers: int = 3) -> HeadLayout:
    return HeadLayout(2, 16, BLOCK, MIN_SPAN, (None,) * layers, KV, widths)


def problem_of(
    budget: float,
    *,
    widths: tuple[int | None, ...] = WIDTHS,
    price: float = 0.05,
    rules_per_layer: int | None = None,
) -> Problem:
    """Losses that fall with the span, and rounding that costs a head about `price` in 4 bits."""
    layout, rng = layout_of(widths), np.random.default_rng(0)
    objectives = []
    for length in LENGTHS:
        spans = np.arange(length // BLOCK + 1) * BLOCK
        scale = rng.uniform(0.1, 2, (3, 2, 1))
        table = scale * (1 - spans / length) ** 2
        table[..., : MIN_SPAN // BLOCK] = np.inf
        noise = NOISE * price * (spans / length)
        objectives.append(Objective(str(length), length, table, {8: noise / 200, 4: noise}))
    found = candidate_rules(LENGTHS, block=BLOCK, min_span=MIN_SPAN, at_least=16)
    rules = with_widths(found, widths)
    return Problem(layout, rules, LENGTHS, tuple(objectives), budget, rules_per_layer)


def best(problem: Problem) -> Plan:
    weights = {objective.name: 1.0 for objective in problem.objectives}
    return solve_weighted(problem, weights, options=SolverOptions(gap=1e-4)).plan


# ---- the program


@pytest.mark.parametrize("budget", [0.15, 0.25, 0.5])
def test_a_plan_keeps_its_budget_of_bytes_at_every_capacity(budget: float) -> None:
    problem = problem_of(budget)
    plan = spend_between(problem, best(problem))
    shares = [plan.byte_share(n, KV) for n in problem.capacities]
    assert max(shares) <= budget
    assert max(shares) > 0.9 * budget
    share, where = largest_share(plan, problem.capacities, KV)
    assert share == max(shares)
    assert plan.byte_share(where, KV) == share
    every = np.array(problem.capacities)
    assert held_at(plan, every, KV).tolist() == [plan.held_bytes(n, KV) for n in every]
    assert over_budget(plan, share, problem.capacities, between=LENGTHS, kv=KV) == ()
    assert over_budget(plan, share - 1e-3, problem.capacities, between=LENGTHS, kv=KV)


def test_widths_are_chosen_head_by_head_as_they_cost() -> None:
    """Cheap rounding is taken everywhere, dear rounding nowhere, and between them heads differ."""

    def widths(price: float) -> set[int | None]:
        plan = best(problem_of(0.4, price=price))
        return {rule.bits for layer in plan.rules for rule in layer}

    assert widths(1e-6) == {4}
    assert 4 not in widths(50.0)
    assert widths(0.2) >= {8, 4}


def test_more_widths_lose_no_more() -> None:
    objectives = problem_of(0.25).objectives
    losses = [
        sum(plan_losses(best(problem_of(0.25, widths=widths)), objectives))
        for widths in (WIDTHS, (None,), (8,), (4,))
    ]
    assert losses[0] <= min(losses[1:]) + 1e-6
    assert losses[0] < losses[1]


def test_few_rules_a_layer_count_widths_too() -> None:
    plan = best(problem_of(0.25, rules_per_layer=1))
    assert all(len(set(layer)) == 1 for layer in plan.rules)


def test_what_is_spent_beyond_keeps_spans_and_widths_where_losses_are_known() -> None:
    problem = replace(problem_of(0.3), lengths=(*LENGTHS, 1024))
    plan = best(problem)
    found = spend_beyond(problem, plan, LENGTHS, options=SolverOptions(gap=1e-2))
    for length in LENGTHS:
        assert found.spans(length) == plan.spans(length)
    assert largest_share(found, problem.capacities, KV)[0] <= 0.3


def test_a_layerwise_plan_has_widths() -> None:
    plan = layerwise_plan(problem_of(0.2, price=1e-6))
    assert all(len(set(layer)) == 1 for layer in plan.rules)
    assert {rule.bits for layer in plan.rules for rule in layer} == {4}
    assert plan.byte_share(512, KV) <= 0.2


def test_the_smallest_budget_is_that_of_the_narrowest_width() -> None:
    with pytest.raises(BudgetError, match=r"minimum span of 32 tokens in 4 bits\)"):
        check_budget(layout_of(), 0.02, (512,))
    check_budget(layout_of(), 0.025, (512,))
    with pytest.raises(BudgetError, match=r"of 32 tokens\)"):
        check_budget(layout_of((None,)), 0.025, (512,))


def test_no_bytes_without_keys() -> None:
    with pytest.raises(ValueError, match="kv must be given"):
        HeadLayout(2, 16, BLOCK, MIN_SPAN, (None,), None, (8,))


# ---- uniform plans


@pytest.mark.parametrize("bits", WIDTHS)
def test_uniform_plans_of_a_width_spend_the_budget(bits: int | None) -> None:
    plan = uniform_plan(layout_of(), budget=0.25, lengths=LENGTHS, bits=bits)
    assert {rule.bits for layer in plan.rules for rule in layer} == {bits}
    for n in LENGTHS:
        assert 0.2 < plan.byte_share(n, KV) <= 0.25


def test_losses_are_weighed_by_8_bits_where_they_drop_something() -> None:
    def bits(budget: float, widths: tuple[int | None, ...] = WIDTHS) -> int | None:
        return reference_plan(layout_of(widths), budget=budget, lengths=LENGTHS).rules[0][0].bits

    assert bits(0.25) == 8
    assert bits(0.75) is None  # in 8 bits all of it would fit
    assert bits(0.05) == 4  # 8 bits do not fit
    assert bits(0.5, (None,)) is None


def test_uniform_plans_that_match_hold_as_many_bytes() -> None:
    plan = best(problem_of(0.25))
    found = matching_uniforms(plan, lengths=(512,), kv=KV)
    assert [one.rules[0][0].bits for one in found] == [None, 8, 4]
    for one in found:
        bits = one.rules[0][0].bits
        apart = abs(one.held_bytes(512, KV) - plan.held_bytes(512, KV))
        assert apart <= 6 * BLOCK * KV.token_bytes(bits) // 2
    narrow = layout_of((4,)).uniform(Rule(MIN_SPAN, 0.0, 4))
    found = matching_uniforms(narrow, lengths=(512,), kv=KV)
    assert [one.rules[0][0].bits for one in found] == [4]


# ---- from the command line


@pytest.fixture(scope="module")
def compiled(tiny_package: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose heads have widths, from the same checkpoint as `tiny_package`."""
    out = tmp_path_factory.mktemp("widths") / "out"
    asked = request(kv_bits="auto", budget=0.2)
    work = tiny_package.work_dir
    compile_model(tiny_package.checkpoint, out, request=asked, work_dir=work)
    return out


def test_a_package_of_widths_verifies_and_keeps_its_bytes(compiled: Path) -> None:
    artifact = open_artifact(compiled)
    assert artifact.kv_format == "planned"
    assert artifact.plan.rounds
    record = load_plan_record(artifact)
    assert record["largest_byte_share"]["share"] <= 0.2
    for n, share in record["byte_share"].items():
        assert share == artifact.plan.byte_share(int(n), artifact.kv)
        assert share < record["density"][n]
    assert record["arguments"]["kv_bits"] == "auto"
    names = [check["name"] for check in artifact.verification["checks"]]
    assert any(name.endswith(": bytes of keys and values") for name in names)
    assert any("sparse differs from dense by" in name for name in names)
    assert artifact.verification["limits"]["float32"] > 2e-3


def test_a_session_that_holds_more_than_was_planned_is_found(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = TorchSession.kv_bytes
    monkeypatch.setattr(TorchSession, "kv_bytes", lambda self, row=None: held(self, row) + 1)
    wrong = [check.name for check in verify(compiled) if not check.ok]
    assert wrong
    assert all(name.endswith(" float32: bytes of keys and values") for name in wrong)


def test_packages_without_widths_say_nothing_of_them(tiny_package: Compiled) -> None:
    artifact = open_artifact(tiny_package.package)
    record = load_plan_record(artifact)
    assert not {"byte_share", "largest_byte_share"} & set(record)
    assert "kv_bits" not in record["arguments"]
    assert "kv_bits" not in artifact.provenance["arguments"]
    assert artifact.verification["limits"]["float32"] == 2e-3
    assert {len(rule) for layer in record["rules"] for rule in layer} == {2}
    assert artifact.kv_format == artifact.dtype


def test_inspect_tells_spans_and_widths_apart(compiled: Path, capsys: Capture) -> None:
    assert moac_command("inspect", compiled) == 0
    shown = capsys.readouterr().out
    assert "widths    of 4 KV heads" in shown
    assert "widths of KV heads, in bits" in shown
    assert re.search(r"capacity +density +bytes +KV held +KV dense", shown)
    assert moac_command("inspect", compiled, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    plan = open_artifact(compiled).plan
    assert found["widths"] == [[rule.bits for rule in layer] for layer in plan.rules]
    for n, held in found["kv_bytes"].items():
        assert held["held"] == plan.held_bytes(int(n), open_artifact(compiled).kv)
        assert found["byte_share"][n] == held["held"] / held["dense"]
    page = (compiled / "report.html").read_text()
    assert "In how many bits" in page


def test_diff_tells_widths(compiled: Path, tiny_package: Compiled, capsys: Capture) -> None:
    assert moac_command("diff", tiny_package.package, compiled) == 0
    assert "KV heads hold keys and values in another width" in capsys.readouterr().out
    assert moac_command("diff", tiny_package.package, compiled, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["widths"]) == sum(
        rule.bits is not None for layer in open_artifact(compiled).plan.rules for rule in layer
    )


def test_a_cap_on_bytes_counts_widths(tiny_package: Compiled, tmp_path: Path) -> None:
    asked = request(kv_bits="8", max_kv_bytes=60_000, length=1000)
    work = tiny_package.work_dir
    compile_model(tiny_package.checkpoint, tmp_path / "out", request=asked, work_dir=work)
    artifact = open_artifact(tmp_path / "out")
    cap = load_plan_record(artifact)["kv_cap"]
    assert cap["held_bytes"] == artifact.plan.held_bytes(1000, artifact.kv) <= 60_000
    assert {rule.bits for layer in artifact.plan.rules for rule in layer} == {8}


def test_within_a_budget_that_8_bits_meet_nothing_is_dropped(
    tiny_package: Compiled, tmp_path: Path
) -> None:
    asked = request(kv_bits="8", budget=0.6)
    work = tiny_package.work_dir
    compile_model(tiny_package.checkpoint, tmp_path / "out", request=asked, work_dir=work)
    plan = open_artifact(tmp_path / "out").plan
    assert {rule.bits for layer in plan.rules for rule in layer} == {8}
    assert all(plan.density(n) == 1 for n in range(512, 2049))


@pytest.mark.parametrize("target", ["onnx", "cuda"])
def test_targets_without_widths_are_refused_by_name(
    target: str, tiny_package: Compiled, compiled: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["compile", tiny_package.checkpoint, "-o", tmp_path / "out", "--target", target]
    said = refused(2, capsys, *words, "--kv-bits", "8")
    assert f"--kv-bits 8 and the target {target} do not go together yet" in said
    said = refused(2, capsys, *words, "--plan", compiled / "plan.json")
    assert f"and the target {target} do not go together yet" in said


@pytest.mark.parametrize("backend", ["onnx", "cuda"])
def test_backends_without_widths_refuse_the_package(backend: str, compiled: Path) -> None:
    said = f"the backend {backend} does not serve yet; run with --backend cpu or torch, or compile"
    with pytest.raises(MoacError, match=said):
        open_backend(open_artifact(compiled), backend)


@pytest.mark.parametrize("session", [OnnxSession, CudaSession])
def test_sessions_without_widths_refuse_the_plan(session: Any, compiled: Path) -> None:
    artifact = open_artifact(compiled)
    rest = (None,) if session is CudaSession else ()
    with pytest.raises(MoacError, match="does not serve yet"):
        session(None, artifact.plan, artifact.head_order, *rest)


def test_a_plan_of_widths_is_packaged_from_its_file(
    tiny_package: Compiled, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOAC_CACHE", str(tiny_package.work_dir))
    out = tmp_path / "out"
    words: list[Any] = ["compile", tiny_package.checkpoint, "-o", out, "--target", "torch"]
    assert moac_command(*words, "--plan", compiled / "plan.json") == 0
    assert open_artifact(out).plan == open_artifact(compiled).plan
    assert load_plan_record(open_artifact(out))["budget"] == 0.2


def test_eval_tells_tokens_and_bytes(
    compiled: Path, tiny_package: Compiled, capsys: Capture
) -> None:
    words = ["eval", compiled, "--source", tiny_package.checkpoint, "--tasks", "nll"]
    words += ["--lengths", "512", "--samples", "1"]
    assert moac_command(*words, "--against", "uniform,dense", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    artifact = open_artifact(compiled)
    assert found["byte_share"]["moac"]["512"] == artifact.plan.byte_share(512, artifact.kv)
    assert found["byte_share"]["uniform"]["512"] < found["density"]["uniform"]["512"]
    assert found["density"]["dense"]["512"] == found["byte_share"]["dense"]["512"] == 1


def test_kv_bits_that_there_are_not() -> None:
    with pytest.raises(UsageError, match="there are no kv bits '2'; choose from full, 8, 4, auto"):
        request(kv_bits="2")
