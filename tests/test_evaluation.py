"""Evaluation: cases with known answers, the two ways of reading, intervals, the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_kernels import library, needs_compiler
from families import tiny_tokenizer
from tiny import Compiled, moac_command
from torch.nn import functional as F

from moac.calibration.prompt import PromptFormat
from moac.evaluation import EvalRequest, evaluate
from moac.evaluation.case import Case, Gold, first_integer, gold_answer, last_integer, recall
from moac.evaluation.intervals import mean_interval, share_interval
from moac.evaluation.longeval import longeval
from moac.evaluation.methods import method_plans
from moac.evaluation.passkey import passkey
from moac.evaluation.results import Outcome, compare
from moac.evaluation.ruler import NIAH, RULER_TASKS, ruler
from moac.evaluation.runner import Runner
from moac.evaluation.sessions import Sessions, open_sessions
from moac.inspection import planned_lengths
from moac.planning import (
    Layout,
    Objective,
    Problem,
    SolverOptions,
    layerwise_plan,
    plan_losses,
    uniform_plan,
)
from moac.verify import undropping
from moac_runtime.artifact import Artifact, load_plan_record, open_artifact
from moac_runtime.cpu.engine import CpuEngine
from moac_runtime.cpu.opening import CpuModel
from moac_runtime.cpu.weights import map_weights
from moac_runtime.errors import UsageError
from moac_runtime.plan import Plan
from moac_runtime.span import Rule

Capture = pytest.CaptureFixture[str]
LENGTH = 2048  # of cases: the tiny tokenizer writes two letters a token
ROOM = 1024  # of sessions


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
    model = CpuModel(artifact, engine, "avx2")
    return Sessions("cpu", "avx2", lambda plan, *sizes: model.session(*sizes, plan=plan))


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
        assert text.count(value) == (2 if task == "passkey" else 1)
        assert abs(text.index(value) / len(text) - depth) < 0.25


def test_half_of_the_passkeys_hide_in_filler_in_every_wording(tokenizer: Any) -> None:
    cases = [passkey(tokenizer, 700, 0, index, 0.5) for index in range(8)]
    texts = [tokenizer.decode(list(case.prompt)) for case in cases]
    kinds = {("The grass is green" in text, text[:90]) for text in texts}
    assert len(kinds) == 6  # two of the four wordings open alike
    assert sum("The grass is green" in text for text in texts) == 4


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
    session = sessions.open(plan, 1, ROOM)
    logits = session.extend([list(case.prompt)])
    tokens = []
    for _ in range(case.limit):
        tokens.append(int(logits.argmax()))
        logits = session.decode(tokens[-1:])
    return tokens


def gold_alone(sessions: Sessions, plan: Plan, case: Case) -> float:
    """The NLL of the gold value behind the prompt, read at once."""
    session = sessions.open(plan, 1, ROOM)
    tokens = [*case.prompt, *case.gold.tokens]
    first = len(case.prompt) + case.gold.scored
    wanted = list(range(first - 1, len(tokens) - 1))
    (logits,) = session.extend_at([tokens], [wanted])
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
    plan = artifact.plan if sparse else undropping(artifact)
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
        runner.text_losses(plan, texts) for plan in (artifact.plan, undropping(artifact))
    )
    for loss in (*sparse, *dense):
        assert loss.stepped == pytest.approx(loss.same_by_prefill, abs=2e-3)
    session = sessions.open(artifact.plan, 1, len(texts[0]))
    (logits,) = session.extend_all([texts[0]])
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
    layout = Layout(num_kv_heads=2, sink=16, block=16, min_span=32, windows=(None,) * 3)
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


# ---- the command


def test_eval_is_the_same_twice_and_whatever_the_batch(tiny_package: Compiled) -> None:
    runs = [
        evaluate(
            tiny_package.package,
            tiny_package.checkpoint,
            request=EvalRequest(tasks=("passkey", "nll"), lengths=(640,), samples=3, batch=batch),
        )
        for batch in (3, 3, 2)
    ]
    assert runs[0].results == runs[1].results
    for one, other in zip(runs[0].results, runs[2].results, strict=True):
        assert (one.task, one.method, one.n) == (other.task, other.method, other.n)
        assert one.value == pytest.approx(other.value, abs=2e-3)


def test_eval_prints_results_for_machines(tiny_package: Compiled, capsys: Capture) -> None:
    capsys.readouterr()
    asked = ["--tasks", "passkey,nll", "--lengths", "640", "--samples", 2, "--json"]
    arguments = ["eval", tiny_package.package, "--source", tiny_package.checkpoint, *asked]
    assert moac_command(*arguments) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err.startswith("prepare: started\n")
    rows = {
        (row["task"], row["method"], row["metric"]): row
        for row in found["results"]
        if "depth" not in row
    }
    for method in ("moac", "dense", "uniform"):
        for task, metric in (("passkey", "exact_match"), ("passkey", "nll"), ("nll", "nll")):
            row = rows[task, method, metric]
            assert row["length"] == 640
            assert row["n"] == 2
            assert row["ci95"][0] <= row["value"] <= row["ci95"][1]
        stepped, prefill = (rows[task, method, "nll"] for task in ("nll_decode", "nll_prefill"))
        assert stepped["value"] == pytest.approx(prefill["value"], abs=2e-3)
    assert rows["nll", "moac", "nll"]["value"] != rows["nll", "dense", "nll"]["value"]
    for row in found["differences"]:
        ours, theirs = (
            rows[row["task"], "moac", row["metric"]],
            rows[row["task"], row["than"], row["metric"]],
        )
        assert row["value"] == pytest.approx(ours["value"] - theirs["value"], abs=1e-9)
        assert row["ci95"][0] <= row["value"] <= row["ci95"][1]
        assert (row["length"], row["n"]) == (640, 2)
    assert (
        {(row["task"], row["than"], row["metric"]) for row in found["differences"]}
        == {(task, than, metric) for task, than, metric in rows if than != "moac"}
        == {
            (task, than, metric)
            for than in ("dense", "uniform")
            for task, metric in (
                ("passkey", "exact_match"),
                ("passkey", "nll"),
                ("nll", "nll"),
                ("nll_decode", "nll"),
                ("nll_prefill", "nll"),
            )
        }
    )
    depths = [row["depth"] for row in found["results"] if row.get("depth") is not None]
    assert set(depths) == {0.3, 0.7}
    assert found["seed"] == 0
    assert found["command"].startswith("moac eval ")
    assert {"machine", "versions", "density", "intervals"} <= set(found)


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
    values = {row.method: row.value for row in found.results if row.task == "nll"}
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
