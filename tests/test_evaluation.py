"""Evaluation: cases with known answers, the two ways of reading, intervals, the command."""

from __future__ import annotations

import json
import lzma
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_kernels import library, needs_compiler
from families import tiny_tokenizer
from tiny import Compiled, moac_command
from torch.nn import functional as F

import moac.evaluation.longeval as longeval_module
import moac.evaluation.ruler as ruler_module
from moac.calibration import calibration_text
from moac.calibration.prompt import PromptFormat
from moac.calibration.tasks import CLOSINGS, INTRODUCTIONS, draw_facts
from moac.evaluation import EvalRequest, evaluate
from moac.evaluation.case import Case, Gold, first_integer, gold_answer, last_integer, recall
from moac.evaluation.intervals import mean_interval, share_interval, stratified_interval
from moac.evaluation.kept import KeptCells
from moac.evaluation.longeval import longeval
from moac.evaluation.methods import method_plans
from moac.evaluation.passkey import passkey, passkey_wording
from moac.evaluation.request import TASK_WORDINGS
from moac.evaluation.results import Outcome, compare, summarise
from moac.evaluation.ruler import NIAH, RULER_TASKS, ruler
from moac.evaluation.runner import Runner
from moac.evaluation.sessions import Sessions, open_sessions
from moac.evaluation.text import KINDS, held_out, kind_tokens, most_windows, windows
from moac.evaluation.wordings import PASSKEY_WORDINGS, SEEN, UNSEEN, WORDINGS, WordingKind
from moac.planning import (
    HeadLayout,
    Objective,
    Problem,
    SolverOptions,
    layerwise_plan,
    plan_losses,
    uniform_plan,
)
from moac.show.inspection import planned_lengths
from moac.store.workspace import Workspace
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.opening import CpuModel
from moac_runtime.backends.cpu.weights import map_weights
from moac_runtime.backends.session import Feed
from moac_runtime.errors import UsageError
from moac_runtime.package.artifact import Artifact, load_plan_record, open_artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule

Capture = pytest.CaptureFixture[str]
LENGTH = 2048  # of cases: the tiny tokenizer writes two letters a token
ROOM = 1024  # of sessions


@pytest.fixture(autouse=True)
def _own_work_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Finished cells of one test must not serve another."""
    monkeypatch.setenv("MOAC_CACHE", str(tmp_path / "kept"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def artifact(tiny_package: Compiled) -> Artifact:
    return open_artifact(tiny_package.package)


@pytest.fixture(
    scope="module", params=[pytest.param("cpu", marks=needs_compiler), pytest.param("torch")]
)
def sessions(request: pytest.FixtureRequest, artifact: Artifact) -> Sessions:
    return open_sessions(artifact) if request.param == "torch" else native_sessions(artifact)


def native_sessions(artifact: Artifact) -> Sessions:
    """What a package with kernels opens; the tiny one was compiled without them, for speed."""
    weights = map_weights(artifact, library("avx2"), artifact.dtype)
    engine = CpuEngine(
        library("avx2"),
        artifact.spec,
        weights.addresses,
        dtype=artifact.dtype,
        threads=1,
        memory=weights.memory,
    )
    model = CpuModel(engine, artifact.plan, artifact.head_order, "avx2", "float32")
    return Sessions("cpu", "avx2", model.session)


@pytest.fixture(scope="module")
def runner(sessions: Sessions) -> Runner:
    return Runner(sessions)


# ---- cases


def made(task: str, tokenizer: Any, length: int, seed: int, index: int, depth: float) -> Case:
    by_name: dict[str, Callable[..., Case]] = {"passkey": passkey, "longeval": longeval}
    if task in by_name:
        return by_name[task](tokenizer, length, seed, index, depth)
    return ruler(tokenizer, task, length, seed, index, depth)


@pytest.mark.parametrize("task", ["passkey", "longeval", *RULER_TASKS])
def test_a_case_fits_and_its_gold_answer_is_right(task: str, tokenizer: Any) -> None:
    case = made(task, tokenizer, LENGTH, 0, 1, 0.3)
    assert case.tokens <= LENGTH
    assert case.tokens > LENGTH - 120  # one more item would not have fitted
    gold = tokenizer.decode(list(case.gold.tokens))
    assert case.score(gold) == 1.0
    assert case.score("nothing of the kind") == 0.0
    value = tokenizer.decode(list(case.gold.tokens[case.gold.scored :]))
    assert case.score(value) == 1.0  # what is scored is the value, and all of it


@pytest.mark.parametrize("task", ["passkey", "longeval", *RULER_TASKS])
def test_cases_are_the_same_for_a_seed_and_differ_between_seeds(task: str, tokenizer: Any) -> None:
    one, again = (made(task, tokenizer, LENGTH, 0, 1, 0.3) for _ in range(2))
    assert (one.prompt, one.gold) == (again.prompt, again.gold)
    assert made(task, tokenizer, LENGTH, 1, 1, 0.3).gold != one.gold
    assert made(task, tokenizer, LENGTH, 0, 2, 0.3).gold != one.gold


ONE_PLACE = [n for n, kind in NIAH.items() if kind.num_queries == kind.num_values == 1]


@pytest.mark.parametrize("task", ["passkey", "longeval", *ONE_PLACE])
def test_the_answer_stands_once_at_its_depth(task: str, tokenizer: Any) -> None:
    for depth in (0.1, 0.9):
        case = made(task, tokenizer, LENGTH, 0, 1, depth)
        text = tokenizer.decode(list(case.prompt))
        value = tokenizer.decode(list(case.gold.tokens[case.gold.scored :])).strip()
        assert case.depth == depth
        once = passkey_wording(UNSEEN, LENGTH, 0, 1).needle.count("{key}")
        assert text.count(value) == (once if task == "passkey" else 1)
        assert abs(text.index(value) / len(text) - depth) < 0.25


@pytest.mark.parametrize("wording", WORDINGS)
def test_every_wording_meets_filler_and_text(tokenizer: Any, wording: WordingKind) -> None:
    pool = PASSKEY_WORDINGS[wording]
    met = []
    for index in range(2 * len(pool)):
        text = tokenizer.decode(list(passkey(tokenizer, 700, 0, index, 0.5, wording).prompt))
        asked = passkey_wording(wording, 700, 0, index)
        assert asked.introduction in text
        assert asked.question in text
        met.append((pool.index(asked), "The grass is green" in text))
    assert sorted(met) == [(place, filler) for place in range(len(pool)) for filler in (0, 1)]
    assert sum(filler for _, filler in met[: len(pool)]) == len(pool) / 2


def runs_of_words(text: str, count: int) -> set[tuple[str, ...]]:
    """Every `count` words in a row of `text`, numbers and slots alike."""
    plain = re.sub(r"\{\w+\}|\d+", "#", text.lower())
    found = re.findall(r"[a-z_']+|#", plain)
    return {tuple(found[i : i + count]) for i in range(len(found) - count + 1)}


@pytest.fixture(scope="module")
def calibrations_words() -> set[tuple[str, ...]]:
    """Every four words in a row of what calibration says around its haystacks."""
    said = [*INTRODUCTIONS, *CLOSINGS]
    for seed in range(300):
        said += [t for f in draw_facts(random.Random(seed), 10) for t in (f.needle, f.question)]
    return {run for text in said for run in runs_of_words(text, 4)}


def test_unseen_wordings_share_no_four_words_with_calibration(
    calibrations_words: set[tuple[str, ...]],
) -> None:
    pool = PASSKEY_WORDINGS[UNSEEN]
    assert len(pool) >= 12
    for texts in ([w.introduction for w in pool], [w.needle for w in pool]):
        assert len(set(texts)) == len(pool)
    for wording in pool:
        for text in (wording.introduction, wording.needle, wording.question):
            assert not runs_of_words(text, 4) & calibrations_words, text
            assert not re.search(r"\d", text)  # the first integer said must be the key
        assert wording.lead


def test_seen_wordings_are_calibrations() -> None:
    drawn = [fact for seed in range(300) for fact in draw_facts(random.Random(seed), 10)]
    facts = {(re.sub(r"\d{5}", "{key}", fact.needle), fact.question) for fact in drawn}
    for wording in PASSKEY_WORDINGS[SEEN]:
        closed = [wording.question.removeprefix(closing).strip() for closing in ("", *ENDS)]
        assert wording.introduction in INTRODUCTIONS
        assert any((wording.needle, question) in facts for question in closed), wording


ENDS = ("That is the end of the text.",)
ASKED = {
    "longeval": [longeval_module._QUESTION],
    **{task: list(ruler_module._NIAH_TEMPLATE.values()) for task in NIAH},
    "vt": [ruler_module._VARIABLES, ruler_module._VARIABLES_PREFIX],
    "cwe": [ruler_module._COMMON, ruler_module._COMMON_PREFIX],
    "fwe": [ruler_module._FREQUENT, ruler_module._FREQUENT_PREFIX],
}


@pytest.mark.parametrize("task", ["longeval", *RULER_TASKS])
def test_a_task_says_whether_calibration_uses_its_words(
    task: str, calibrations_words: set[tuple[str, ...]]
) -> None:
    shared = [bool(runs_of_words(text, 4) & calibrations_words) for text in ASKED[task]]
    assert TASK_WORDINGS[task] == ((SEEN,) if any(shared) else (UNSEEN,))


def test_half_of_the_cases_are_in_each_wording_and_the_odd_one_is_unseen() -> None:
    asked = EvalRequest(tasks=("passkey", "longeval", "vt"), samples=5)
    assert asked.counts("passkey") == {UNSEEN: 3, SEEN: 2}
    assert asked.counts("longeval") == {SEEN: 5}
    assert replace(asked, samples=1).counts("passkey") == {UNSEEN: 1}
    unseen = EvalRequest(wording="unseen")
    assert unseen.synthetic() == ("passkey", "vt", "cwe", "fwe")
    assert unseen.counts("passkey") == {UNSEEN: 50}


def test_too_short_a_length_is_a_sentence(tokenizer: Any) -> None:
    for task in ("passkey", "longeval", "niah_single_1", "vt"):
        with pytest.raises(UsageError, match="evaluate at longer lengths"):
            made(task, tokenizer, 150, 0, 0, 0.5)


def test_scores() -> None:
    assert first_integer("12")("The key is 12, not 13.") == 1
    assert first_integer("12")("The key is 123.") == 0
    assert last_integer("12")("In line 3 it is 12.") == 1
    assert last_integer("12")("no number") == 0
    assert recall(["Ab", "cd", "ef", "gh"])("xx aB\n CD") == 0.5


# ---- reading


def greedy_alone(sessions: Sessions, plan: Plan, case: Case) -> list[int]:
    """The greedy answer of one row, read at once."""
    session = sessions.open(plan)
    row = session.admit(ROOM)
    logits = session.step([Feed(row, case.prompt)])
    tokens = []
    for _ in range(case.limit):
        tokens.append(int(logits.argmax()))
        logits = session.step([Feed(row, tokens[-1:])])
    return tokens


def gold_alone(sessions: Sessions, plan: Plan, case: Case) -> float:
    """The NLL of the gold value behind the prompt, read at once."""
    session = sessions.open(plan)
    tokens = [*case.prompt, *case.gold.tokens]
    first = len(case.prompt) + case.gold.scored
    wanted = list(range(first - 1, len(tokens) - 1))
    logits = session.step([Feed(session.admit(ROOM), tokens, wanted)])
    return float(F.cross_entropy(torch.as_tensor(logits), torch.tensor(tokens[first:])))


def short_cases() -> list[Case]:
    """Ragged prompts and answers of every length order, one of them as full as can be."""
    rng = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 300, (count,), generator=rng).tolist())

    sizes = [(900, 12, 4, 2), (905, 3, 9, 0), (ROOM - 12, 12, 5, 1)]
    return [
        Case(tokens(prompt), Gold(tokens(gold), scored), limit, recall(["x"]), None)
        for prompt, limit, gold, scored in sizes
    ]


@pytest.mark.parametrize("sparse", [True, False])
def test_a_batch_answers_as_each_row_alone(
    artifact: Artifact, sessions: Sessions, runner: Runner, sparse: bool
) -> None:
    plan = artifact.plan if sparse else artifact.plan.undropping()
    cases = short_cases()
    replies = runner.replies(plan, cases, capacity=ROOM, eos=frozenset())
    for case, reply in zip(cases, replies, strict=True):
        assert list(reply.tokens) == greedy_alone(sessions, plan, case)
        assert reply.nll == pytest.approx(gold_alone(sessions, plan, case), abs=2e-3)


def test_an_answer_ends_before_its_end_token(
    artifact: Artifact, sessions: Sessions, runner: Runner
) -> None:
    case = short_cases()[0]
    (free,) = runner.replies(artifact.plan, [case], capacity=ROOM, eos=frozenset())
    end = free.tokens[5]
    (ended,) = runner.replies(artifact.plan, [case], capacity=ROOM, eos=frozenset([end]))
    assert ended.tokens == free.tokens[: free.tokens.index(end)]
    assert ended.nll == free.nll


def test_text_losses_agree_and_show_what_a_plan_drops(
    artifact: Artifact, sessions: Sessions, runner: Runner
) -> None:
    texts = [list(range(3 + shift, 303)) * 3 for shift in (0, 0)]
    sparse, dense = (
        runner.text_losses(plan, texts) for plan in (artifact.plan, artifact.plan.undropping())
    )
    for loss in (*sparse, *dense):
        assert loss.stepped == pytest.approx(loss.same_by_prefill, abs=2e-3)
    session, count = sessions.open(artifact.plan), len(texts[0])
    logits = session.step([Feed(session.admit(count), texts[0], range(count))])
    whole = F.cross_entropy(torch.as_tensor(logits)[:-1], torch.tensor(texts[0][1:]))
    assert sparse[0].whole == pytest.approx(float(whole), abs=2e-3)
    assert abs(sparse[0].whole - dense[0].whole) > 2e-3


def test_the_uniform_plan_holds_as_much_at_each_length(artifact: Artifact) -> None:
    plans = method_plans(artifact, ["dense", "uniform"])
    assert list(plans) == ["moac", "dense", "uniform"]
    for length in (512, 700, 2048):
        own, uniform = (plans[name](length).density(length) for name in ("moac", "uniform"))
        assert abs(uniform - own) <= 16 / 2 / length + 1e-9  # half a block a head
        assert plans["dense"](length).density(length) == 1


def test_the_layerwise_plan_is_the_best_of_all_with_one_rule_a_layer() -> None:
    rng = np.random.default_rng(0)
    layout = HeadLayout(num_kv_heads=2, sink=16, block=16, min_span=32, windows=(None,) * 3)
    tables = np.sort(rng.random((2, 3, 2, 17)))[..., ::-1].copy()
    rules = (Rule(32, 0.0), Rule(0, 0.25), Rule(0, 0.5), Rule(64, 0.5), Rule(0, 1.0))
    objectives = tuple(Objective(f"{k}", 256, tables[k]) for k in range(2))
    problem = Problem(
        layout=layout, rules=rules, lengths=(256,), objectives=objectives, budget=0.5
    )
    found = layerwise_plan(problem, options=SolverOptions(gap=0.0))
    units = plan_losses(uniform_plan(layout, budget=0.5, lengths=(256,)), objectives)

    def loss(plan: Plan) -> float:
        return sum(a / b for a, b in zip(plan_losses(plan, objectives), units, strict=True))

    every = [layout.plan([[rule] * 2 for rule in row]) for row in product(rules, repeat=3)]
    best = min(loss(plan) for plan in every if plan.density(256) <= 0.5)
    assert found.density(256) <= 0.5
    assert all(len(set(layer)) == 1 for layer in found.rules)
    assert loss(found) == pytest.approx(best)


def test_the_package_records_its_layerwise_baseline(artifact: Artifact) -> None:
    plan = method_plans(artifact, ["layerwise"])["layerwise"](512)
    assert all(len(set(layer)) == 1 for layer in plan.rules)
    for length in planned_lengths(load_plan_record(artifact)):
        assert plan.density(length) <= 0.5


def test_a_package_without_layerwise_rules_says_so(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {k: v for k, v in load_plan_record(artifact).items() if k != "layerwise"}
    monkeypatch.setattr("moac.evaluation.methods.load_plan_record", lambda _: record)
    with pytest.raises(UsageError, match="compiled without a layerwise baseline"):
        method_plans(artifact, ["layerwise"])


# ---- figures


def test_wilson_intervals_are_the_textbook_ones() -> None:
    low, high = share_interval([1.0] * 9 + [0.0])
    assert (low, high) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert share_interval([0.0] * 10)[0] == 0
    assert share_interval([1.0] * 10)[1] == 1


def test_student_intervals_are_the_textbook_ones() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0]) or (0, 0)
    half = 2.776445 * math.sqrt(2.5 / 5)  # quantile of 4 degrees of freedom
    assert (low, high) == pytest.approx((3 - half, 3 + half), rel=5e-3)
    assert mean_interval([1.0]) is None
    one = mean_interval([0.0, 2.0]) or (0, 0)
    assert one[1] - 1 == pytest.approx(12.7062, rel=1e-4)


def test_a_stratified_interval_counts_what_varies_within_strata_alone() -> None:
    near, far = [1.0, 2.0, 3.0, 4.0], [101.0, 102.0, 103.0, 104.0]
    low, high = stratified_interval([near, far]) or (0, 0)
    assert (low + high) / 2 == pytest.approx(52.5)
    spread = math.sqrt(2 * (5 / 3) / 4) / 2
    assert high - 52.5 == pytest.approx(2.446912 * spread, rel=5e-3)  # 6 degrees of freedom
    assert stratified_interval([near]) == pytest.approx(mean_interval(near))
    assert stratified_interval([near, [1.0]]) is None
    assert stratified_interval([[2.0, 2.0], [4.0, 4.0]]) == (3.0, 3.0)
    wide = stratified_interval([[0.0, 2.0], [5.0, 5.0]]) or (0, 0)
    assert wide[1] - wide[0] == pytest.approx(12.7062, rel=1e-4)  # one degree of freedom


def test_kinds_of_text_come_together_and_wordings_never_do() -> None:
    texts = [Outcome(None, x, part=kind) for kind, x in (("code", 1.0), ("prose", 3.0)) * 2]
    found = list(summarise("nll", 64, "moac", texts))
    assert [(r.part, r.value, r.n) for r in found] == [
        (None, 2.0, 4), ("prose", 3.0, 2), ("code", 1.0, 2)
    ]  # fmt: skip
    cases = [Outcome(s, 1.0, part=w) for s, w in ((0.0, SEEN), (1.0, UNSEEN))]
    exact = [r for r in summarise("passkey", 64, "moac", cases) if r.metric == "exact_match"]
    assert [(r.part, r.value) for r in exact] == [(UNSEEN, 1.0), (SEEN, 0.0)]
    alone = list(summarise("nll", 64, "moac", texts[::2]))
    assert [r.part for r in alone] == ["code"]


# ---- held-out text

DATA = Path(__file__).parents[1] / "moac" / "evaluation" / "data"


def test_every_held_out_file_has_its_origin_and_licence_and_no_trademark() -> None:
    told = (DATA / "README.md").read_text(encoding="utf-8")
    compressed = [*DATA.glob("*/*.txt.xz")]
    assert {file.parent.name for file in compressed} == set(KINDS)
    for file in compressed:
        assert f"`{file.relative_to(DATA)}`" in told
        assert file.stat().st_size < 2**20
        assert "gutenberg" not in lzma.decompress(file.read_bytes()).decode().lower()
    for file in (DATA / "licences").iterdir():
        assert f"licences/{file.name}" in told
    assert set(re.findall(r"licences/(\S+\.txt)", told)) == {
        file.name for file in (DATA / "licences").iterdir()
    }


def test_no_held_out_text_repeats_calibrations_or_another() -> None:
    def runs(text: str) -> set[int]:
        words = text.split()
        return {hash(tuple(words[i : i + 50])) for i in range(len(words) - 49)}

    seen = {run for document in calibration_text() for run in runs(document.text)}
    for kind in KINDS:
        for document in held_out(kind):
            found = runs(document.text)
            assert found
            assert not found & seen, document.title
            seen |= found


def test_each_kind_of_text_holds_a_window_of_131072_tokens() -> None:
    """No tokenizer in use writes more than five characters a token in the mean."""
    for kind in KINDS:
        assert sum(len(document.text) for document in held_out(kind)) > 5 * 131_072, kind


def test_windows_are_exact_and_never_overlap(tokenizer: Any) -> None:
    tokens = kind_tokens(tokenizer, "code")
    numbered = range(len(tokens))
    for seed in (0, 1):
        found = windows(numbered, 700, 100, seed)
        assert all(window == tuple(range(window[0], window[0] + 700)) for window in found)
        assert all(a[-1] < b[0] for a, b in pairwise(found))
    assert windows(tokens, 700, 3, 0) != windows(tokens, 700, 3, 1)
    full = windows(range(2100), 700, 3, 0)
    assert [window[0] for window in full] == [0, 700, 1400]


def test_a_figure_reads_at_most_100000_tokens_of_a_kind() -> None:
    assert most_windows(200_000, 1000) == 100
    assert most_windows(50_000, 1000) == 50
    assert most_windows(200_000, 4096) == 24
    assert most_windows(200_000, 131_072) == 1
    with pytest.raises(UsageError, match="has 5000 tokens, fewer than a window of 8192"):
        most_windows(5000, 8192)


def test_more_windows_than_there_are_are_capped_with_a_line(
    tiny_package: Compiled, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("moac.evaluation.text.MOST_TOKENS", 2000)
    asked = EvalRequest(tasks=("nll",), lengths=(640,), samples=5, against=(), text=("code",))
    found = evaluate(tiny_package.package, tiny_package.checkpoint, request=asked)
    assert {row.n for row in found.results} == {3}
    assert (
        "note: nll reads 3 windows of 640 tokens of code where 5 were" in capsys.readouterr().err
    )


# ---- the command


def test_eval_is_the_same_twice_and_whatever_the_batch(
    tiny_package: Compiled, tmp_path: Path
) -> None:
    runs = [
        evaluate(
            tiny_package.package,
            tiny_package.checkpoint,
            request=EvalRequest(
                tasks=("passkey", "nll"), lengths=(640,), samples=3, batch=batch, text=("code",)
            ),
            work_dir=tmp_path / str(place),
        )
        for place, batch in enumerate((3, 3, 2))
    ]
    assert all(run.record["cells"] == {"all": 9, "kept": 0} for run in runs)
    assert runs[0].results == runs[1].results
    for one, other in zip(runs[0].results, runs[2].results, strict=True):
        assert (one.task, one.method, one.n) == (other.task, other.method, other.n)
        assert one.value == pytest.approx(other.value, abs=2e-3)


def test_eval_prints_results_for_machines(tiny_package: Compiled, capsys: Capture) -> None:
    capsys.readouterr()
    asked = ["--tasks", "passkey,nll", "--lengths", "640", "--samples", 4, "--json"]
    arguments = ["eval", tiny_package.package, "--source", tiny_package.checkpoint, *asked]
    assert moac_command(*arguments) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err.startswith("prepare: started\n")

    def part(row: dict[str, Any]) -> str | None:
        return row.get("wording") or row.get("text")

    rows = {
        (row["task"], part(row), row["method"], row["metric"]): row
        for row in found["results"]
        if "depth" not in row
    }
    expected = {("passkey", wording, m) for wording in WORDINGS for m in ("exact_match", "nll")}
    texts = ("nll", "nll_decode", "nll_prefill")
    expected |= {(task, kind, "nll") for task in texts for kind in (None, *KINDS)}
    assert {(task, kind, metric) for task, kind, _, metric in rows} == expected
    assert next(iter(rows)) == ("passkey", UNSEEN, "moac", "exact_match")
    for (task, kind, _, _), row in rows.items():
        assert row["length"] == 640
        assert row["n"] == (2 if task == "passkey" else 4 if kind else 12)
        assert row["ci95"][0] <= row["value"] <= row["ci95"][1]
        assert ("wording" in row) == (task == "passkey")
        assert ("text" in row) == (kind in KINDS)
    for method in ("moac", "dense", "uniform"):
        of_kinds = [rows["nll", kind, method, "nll"]["value"] for kind in KINDS]
        pooled = rows["nll", None, method, "nll"]["value"]
        assert pooled == pytest.approx(sum(of_kinds) / 3)
        stepped, prefill = (rows[task, "code", method, "nll"] for task in texts[1:])
        assert stepped["value"] == pytest.approx(prefill["value"], abs=2e-3)
    own, dense = (rows["nll", None, method, "nll"]["value"] for method in ("moac", "dense"))
    assert own != dense
    differences = {(r["task"], part(r), r["than"], r["metric"]): r for r in found["differences"]}
    assert set(differences) == {key for key in rows if key[2] != "moac"}
    for (task, kind, than, metric), row in differences.items():
        ours, theirs = (rows[task, kind, method, metric] for method in ("moac", than))
        assert row["value"] == pytest.approx(ours["value"] - theirs["value"], abs=1e-9)
        assert row["ci95"][0] <= row["value"] <= row["ci95"][1]
        assert (row["length"], row["n"]) == (640, ours["n"])
    deep = {(r["wording"], r["depth"]) for r in found["results"] if r.get("depth") is not None}
    assert deep == {(wording, depth) for wording in WORDINGS for depth in (0.3, 0.7)}
    for (task, kind, method, metric), row in rows.items():
        name = "score" if metric == "exact_match" else "nll"
        told = [case[name][method] for case in found["cases"]
                if case["task"] == task and kind in (None, part(case))]  # fmt: skip
        assert len(told) == row["n"]
        assert row["value"] == pytest.approx(sum(told) / row["n"])
    assert found["seed"] == 0
    assert found["command"].startswith("moac eval ")
    assert {"machine", "versions", "density", "intervals"} <= set(found)


class Cut(Exception):
    """What stops an evaluation in the middle."""


def test_an_evaluation_cut_short_goes_on(
    tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    asked = EvalRequest(tasks=("passkey", "nll"), lengths=(640,), samples=2, text=("code",))
    arguments = (tiny_package.package, tiny_package.checkpoint)
    whole = evaluate(*arguments, request=asked, work_dir=tmp_path / "other")
    runs: list[str] = []

    def counting(patched: pytest.MonkeyPatch, name: str, stop: int | None = None) -> None:
        real = getattr(Runner, name)

        def run(self: Runner, *given: Any, **options: Any) -> Any:
            runs.append(name)
            if len(runs) == stop:
                raise Cut
            return real(self, *given, **options)

        patched.setattr(Runner, name, run)

    with monkeypatch.context() as patched:
        counting(patched, "replies", 5)
        with pytest.raises(Cut):
            evaluate(*arguments, request=asked, work_dir=tmp_path / "kept")
    monkeypatch.setenv("MOAC_CACHE", str(tmp_path / "unused"))
    runs.clear()
    counting(monkeypatch, "replies")
    counting(monkeypatch, "text_losses")
    resumed = evaluate(*arguments, request=asked, work_dir=tmp_path / "kept")
    assert runs == ["replies"] * 2 + ["text_losses"] * 3
    assert resumed.record["cells"] == {"all": 9, "kept": 4}
    assert (resumed.results, resumed.differences) == (whole.results, whole.differences)
    assert "note: 4 of 9 cells were kept from an earlier run" in capsys.readouterr().err
    runs.clear()
    again = evaluate(*arguments, request=asked, work_dir=tmp_path / "kept")
    assert runs == []
    assert again.results == whole.results
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"samples": 4},
        {"lengths": (656,)},
        {"batch": 1},
        {"wording": "seen"},
    ],
)
def test_what_is_kept_serves_the_same_question_alone(
    tiny_package: Compiled, change: dict[str, Any]
) -> None:
    asked = EvalRequest(
        tasks=("passkey",), lengths=(640,), samples=2, against=(), wording="unseen"
    )
    arguments = (tiny_package.package, tiny_package.checkpoint)
    evaluate(*arguments, request=asked)
    again = evaluate(*arguments, request=replace(asked, **change))
    assert again.record["cells"]["kept"] == 0


def test_what_is_kept_belongs_to_plan_package_backend_and_code(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_sessions = Sessions("torch", "torch's own operators", lambda *_: None)  # type: ignore[arg-type,return-value]
    plan = artifact.plan

    def named(
        package: Artifact = artifact, by: Sessions = torch_sessions, under: Plan = plan
    ) -> str:
        kept = KeptCells.of(Workspace(tmp_path), package, by, batch=8)
        return kept.key(under, asked=[[1, 2]], task="nll")

    first = named()
    assert named() == first
    other = replace(artifact.files["plan.json"], sha256="0" * 64)
    assert named(replace(artifact, files={**artifact.files, "plan.json": other})) != first
    assert named(by=replace(torch_sessions, runs="another")) != first
    assert named(under=artifact.plan.undropping()) != first
    monkeypatch.setattr("moac.evaluation.kept.source_digest", lambda *_: "changed")
    assert named() != first


def test_differences_pair_the_same_cases() -> None:
    """Cases differ by far more than plans do: pairing is what makes a small difference tell."""
    dense = [Outcome(None, nll) for nll in (1.0, 2.0, 3.0, 4.0)]
    own = [
        Outcome(None, o.nll + rise) for o, rise in zip(dense, (0.1, 0.2, 0.1, 0.2), strict=True)
    ]
    (found,) = compare("nll", 64, {"moac": own, "dense": dense})
    assert found.value == pytest.approx(0.15)
    assert found.ci95 is not None
    assert 0.05 < found.ci95[0] < 0.15 < found.ci95[1] < 0.25
    (alone,) = compare("nll", 64, {"moac": own[:1], "dense": dense[:1]})
    assert alone.ci95 is None
    assert list(compare("nll", 64, {"moac": own})) == []


def test_eval_compares_with_a_plan_file(tiny_package: Compiled, tmp_path: Path) -> None:
    """The package's own plan from a file does as the package; with every rule full, as dense."""
    own, full = tmp_path / "own.json", tmp_path / "full.json"
    plan = json.loads((tiny_package.package / "plan.json").read_text())
    own.write_text(json.dumps(plan))
    plan["rules"] = [[[0, 1.0] for _ in layer] for layer in plan["rules"]]
    full.write_text(json.dumps(plan))
    found = evaluate(
        tiny_package.package,
        tiny_package.checkpoint,
        request=EvalRequest(
            tasks=("nll",), lengths=(640,), samples=2, against=("dense", str(own), str(full))
        ),
    )
    values = {r.method: r.value for r in found.results if (r.task, r.part) == ("nll", None)}
    assert list(values) == ["moac", "dense", "own", "full"]
    assert values["own"] == values["moac"] != values["dense"] == values["full"]


def test_eval_prints_a_table_and_a_users_own_task(
    tiny_package: Compiled, tmp_path: Path, capsys: Capture
) -> None:
    own = tmp_path / "capitals.jsonl"
    lines = [
        {"prompt": "What is the capital of France?", "answer": "Paris"},
        {"messages": [{"role": "user", "content": "And of Peru?"}], "answer": "Lima"},
    ]
    own.write_text("\n".join(json.dumps(line) for line in lines))
    capsys.readouterr()
    asked = ["--task", own, "--lengths", "512", "--against", "dense"]
    arguments = ["eval", tiny_package.package, "--source", tiny_package.checkpoint, *asked]
    assert moac_command(*arguments) == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if line.startswith("task"))
    assert header.split() == ["task", "length", "metric", "n", "moac", "dense"]
    assert [line.split()[:4] for line in out.splitlines() if line.startswith("capitals")] == [
        ["capitals", "512", "exact_match", "2"],
        ["capitals", "512", "nll", "2"],
    ] * 2  # the figures, and what they differ by
    assert "moac less another  length       metric  n" in out


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        (["--tasks", "passkeys"], 2, "there is no task 'passkeys'; choose from passkey, "),
        (["--against", "sparse"], 2, "there is no baseline 'sparse'; choose from dense, "),
        (["--lengths", "4096"], 2, "beyond the package's capacity of 2048 tokens"),
        (["--lengths", "0"], 2, "lengths must be positive numbers of tokens"),
        (["--samples", "0"], 2, "samples is 0, expected at least 1"),
        (["--backend", "cuda"], 2, "there is no backend 'cuda' to evaluate on; choose from cpu, "),
        (["--against", "no/such.json"], 1, "the plan no/such.json cannot be read"),
        (["--against", "dense,dense"], 2, "two of the plans to compare bear the name dense"),
        (["--batch", "0"], 2, "batch is 0, expected at least 1"),
        (["--seed", "-1"], 2, "seed is -1, expected 0 to 2^63 - 1"),
        (["--task", "no/such.jsonl"], 2, "cannot read the task file no/such.jsonl"),
        (["--wording", "new"], 2, "there is no wording 'new'; choose from unseen, seen, both"),
        (["--wording", "unseen", "--tasks", "longeval"], 2, "longeval has seen wordings alone"),
        (["--wording", "seen", "--tasks", "passkey,vt"], 2, "vt has unseen wordings alone"),
        (["--wording", "seen", "--tasks", "nll"], 2, "no task asked for has any; leave it out"),
        (["--text", "verse"], 2, "text is 'verse', expected some of prose,code,documentation"),
        (["--text", "code,code"], 2, "text is 'code,code', expected some of prose"),
        (["--text", "code", "--tasks", "passkey"], 2, "--text chooses what the task nll reads"),
        (["--text", ""], 2, "text is '', expected some of prose,code,documentation"),
    ],
)
def test_wrong_usage_of_eval(
    tiny_package: Compiled, capsys: Capture, asked: list[str], code: int, words: str
) -> None:
    arguments = ["eval", tiny_package.package, "--source", tiny_package.checkpoint, *asked]
    capsys.readouterr()
    assert moac_command(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not valid JSON"),
        ('{"prompt": "x", "response": "y"}', "line 2: unknown key 'response'; known are "),
        ('{"prompt": "x"}', 'line 2: there is no "answer"'),
        ('{"prompt": "x", "answer": " "}', 'line 2: "answer" must be text that is not empty'),
        ('{"answer": "y"}', 'line 2: give either "prompt" or "messages"'),
        (json.dumps({"prompt": "word " * 900, "answer": "y"}), "line 2: the prompt and its"),
    ],
)
def test_a_bad_line_of_a_task_is_named(
    tiny_package: Compiled, tmp_path: Path, capsys: Capture, line: str, words: str
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(f'{{"prompt": "fine", "answer": "yes"}}\n{line}\n')
    arguments = ["--source", tiny_package.checkpoint, "--task", own, "--lengths", "512"]
    capsys.readouterr()
    assert moac_command("eval", tiny_package.package, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_task_file_must_not_pass_for_a_task_of_ours(tmp_path: Path) -> None:
    own = tmp_path / "passkey.jsonl"
    own.write_text('{"prompt": "x", "answer": "y"}')
    with pytest.raises(UsageError, match="bears the name of the task passkey"):
        EvalRequest(task=own)


def test_another_models_checkpoint_is_refused(
    tiny_package: Compiled, tiny_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(UsageError, match="is another model than this package's"):
        evaluate(tiny_package.package, tiny_checkpoint("qwen3"))


def test_a_gold_answer_scores_its_value_alone(tokenizer: Any) -> None:
    gold = gold_answer(PromptFormat(tokenizer), "12345", lead="The pass key is ")
    assert tokenizer.decode(list(gold.tokens)) == "The pass key is 12345"
    assert tokenizer.decode(list(gold.tokens[gold.scored :])) == "12345"
