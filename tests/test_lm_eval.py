"""The package as a model of lm-evaluation-harness: a local task, a local data set, no hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Compiled
from torch.nn import functional as F

import moac_runtime
from moac.pipeline.verify import session_logits
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.errors import UsageError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.weights import load_weights

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own dependencies warn
pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from moac.evaluation.lm_eval import MoacLM  # noqa: E402

CAPITALS = [("France", "Paris", "Rome"), ("Italy", "Rome", "Oslo"), ("Peru", "Lima", "Cairo")]
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "The capital of {{{{country}}}} is"
{answer}
metric_list: [{{metric: {metric}}}]
"""
CHOICE = 'doc_to_choice: "{{[right, wrong]}}"\ndoc_to_target: 0'
UNTIL = 'doc_to_target: "{{right}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 4}'


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task "capitals" and its data; the data set library caches there too."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"country": c, "right": f" {r}", "wrong": f" {w}"} for c, r, w in CAPITALS]
    data = tmp_path / "capitals.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def write_task(folder: Path, kind: str, answer: str, metric: str) -> None:
    text = TASK.format(data=folder / "capitals.jsonl", kind=kind, answer=answer, metric=metric)
    (folder / "capitals.yaml").write_text(text)


def evaluated(folder: Path, package: Path, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = simple_evaluate(
        model="moac",
        model_args=f"path={package}",
        tasks=["capitals"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        **more,
    )
    return found


@pytest.mark.parametrize("chat", [False, True])
def test_a_multiple_choice_task(tiny_package: Compiled, tasks: Path, chat: bool) -> None:
    write_task(tasks, "multiple_choice", CHOICE, "acc")
    found = evaluated(tasks, tiny_package.package, apply_chat_template=chat)
    assert found["n-samples"]["capitals"]["effective"] == 3
    right = []
    for sample in found["samples"]["capitals"]:
        scores = [float(answer[0][0]) for answer in sample["resps"]]
        right.append(scores[0] > scores[1])
    assert found["results"]["capitals"]["acc,none"] == pytest.approx(sum(right) / 3)


def test_a_generation_task(tiny_package: Compiled, tasks: Path) -> None:
    write_task(tasks, "generate_until", UNTIL, "exact_match")
    found = evaluated(tasks, tiny_package.package)
    assert 0 <= found["results"]["capitals"]["exact_match,none"] <= 1
    model = moac_runtime.load(tiny_package.package)
    for sample in found["samples"]["capitals"]:
        context = f"The capital of {sample['doc']['country']} is"
        (own,) = model.generate([context], raw=True, max_tokens=4, stop=["\n"], temperature=0)
        assert sample["resps"] == [[own.text]]


@pytest.mark.slow  # the harness first reads every task it was shipped with
def test_the_command_line(tiny_package: Compiled, tasks: Path) -> None:
    write_task(tasks, "multiple_choice", CHOICE, "acc")
    options = ["--model_args", f"path={tiny_package.package}", "--tasks", "capitals"]
    options += ["--include_path", str(tasks)]
    done = subprocess.run(
        [sys.executable, "-m", "moac.evaluation.lm_eval", "--model", "moac", *options],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "|capitals|" in done.stdout.replace(" ", "")


def reference(plan: Plan, package: Path, tokens: list[int], scored: int, capacity: int) -> float:
    """Log-likelihood of the last tokens by the runtime, one row at `capacity`."""
    artifact = open_artifact(package)
    kind = getattr(torch, artifact.dtype)
    decoder = Decoder(artifact.spec, load_weights(artifact, kind), dtype=kind)
    filler = [5] * (capacity - len(tokens))  # later tokens change nothing before them
    places = list(range(len(tokens) - scored - 1, len(tokens) - 1))
    session = TorchSession(decoder, plan, artifact.head_order)
    logits = session_logits(session, [*tokens, *filler], places)
    return -float(F.cross_entropy(logits, torch.tensor(tokens[-scored:]), reduction="sum"))


def test_loglikelihoods_are_the_runtimes(tiny_package: Compiled) -> None:
    artifact = open_artifact(tiny_package.package)
    plans = {"moac": artifact.plan, "dense": artifact.plan.undropping()}
    contexts = ["the quick brown fox " * 40, "the key is hidden " * 12]
    values = {}
    for name, plan in plans.items():
        model = MoacLM(str(tiny_package.package), plan=name, batch_size=2)
        asked = [
            Instance("loglikelihood", {}, (context, " answer"), index)
            for index, context in enumerate(contexts * 2)
        ]
        found = model.loglikelihood(asked, disable_tqdm=True)
        for one, again in zip(found[:2], found[2:], strict=True):
            assert one[0] == pytest.approx(again[0], abs=2e-3)
        for context, (value, _) in zip(contexts, found, strict=False):
            tokens = model.tok_encode(context.rstrip() + context[-1] + " answer")
            scored = len(tokens) - len(model.tok_encode(context.rstrip()))
            capacity = -(-len(tokens) // 64) * 64
            expected = reference(plan, tiny_package.package, tokens, scored, capacity)
            assert value == pytest.approx(expected, abs=2e-3)
        values[name] = found[0][0]
    assert abs(values["moac"] - values["dense"]) > 2e-3


def test_a_rolling_text_is_every_token_once(tiny_package: Compiled) -> None:
    model = MoacLM(str(tiny_package.package), plan="dense", capacity=64)
    text = "the quick brown fox " * 12
    (found,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    tokens = [model.prefix_token_id, *model.tok_encode(text, add_special_tokens=False)]
    plan = open_artifact(tiny_package.package).plan.undropping()
    expected, done = 0.0, 1
    while done < len(tokens):
        stop = min(done + 63, len(tokens))
        window = tokens[max(0, stop - 64) : stop]
        expected += reference(plan, tiny_package.package, window, stop - done, 64)
        done = stop
    assert found == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"plan": "sparse"}, "there is no baseline 'sparse'"),
        ({"capacity": 4096}, "capacity is 4096, expected 1 to the package's 2048"),
        ({"batch_size": "auto"}, "batch_size is 'auto', expected a number"),
        ({"device": "cuda"}, "packages are evaluated on the cpu"),
    ],
)
def test_arguments_that_cannot_be_meant(
    tiny_package: Compiled, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        MoacLM(str(tiny_package.package), **arguments)


def test_a_request_beyond_the_capacity_is_refused(tiny_package: Compiled) -> None:
    model = MoacLM(str(tiny_package.package), capacity=64)
    asked = [Instance("loglikelihood", {}, ("the quick brown fox " * 40, " jumps"), 0)]
    with pytest.raises(UsageError, match="and a session holds 64"):
        model.loglikelihood(asked, disable_tqdm=True)
