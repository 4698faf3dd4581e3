"""The whole path: checkpoint, compile, inspect, verify, run, against transformers' own models."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import Batch
from gguf_files import write_gguf
from oracle import oracle_logits
from tiny import CONTEXT, Compiled, moac_command, options, request

import moac_runtime
from moac import CompileResult, compile_model
from moac.checkpoint import open_checkpoint
from moac.pipeline.verify import verify
from moac.profiling.influence import sample_influence
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.package.artifact import Artifact, open_artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.weights import load_weights

Make = Callable[..., Path]

# Every family and every RoPE kind in one package each; the default RoPE is `tiny_package`.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope": "llama3", "max_position_embeddings": CONTEXT, "attention_bias": True},
    "mistral": {"rope": "yarn", "max_position_embeddings": CONTEXT, "sliding_window": 640},
    "qwen2": {"rope": "dynamic", "max_position_embeddings": CONTEXT // 4},
    "qwen3": {"rope": "linear", "max_position_embeddings": CONTEXT},
    "smollm3": {"max_position_embeddings": CONTEXT},
    "granite": {"max_position_embeddings": CONTEXT},
    "gemma3_text": {"max_position_embeddings": CONTEXT, "sliding_window": 640},
    "gemma2": {"max_position_embeddings": CONTEXT, "sliding_window": 640},
    "olmo2": {"max_position_embeddings": CONTEXT},
    "phi3": {
        "rope": "longrope",
        "max_position_embeddings": CONTEXT,
        "original_max_position_embeddings": 640,
    },
    "cohere2": {"max_position_embeddings": CONTEXT, "sliding_window": 640},
    "stablelm": {"max_position_embeddings": CONTEXT},
}
INSPECTED = (
    *("density", "kv_bytes", "rules", "sink", "block", "lengths", "capacity", "targets"),
    "provenance",
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class Profiler:
    """Stands before the real one: notes what is profiled, and may be interrupted.

    `domains` around the dense model, `drafts` around a draft of the plan.
    """

    def __init__(self) -> None:
        self.domains: list[str] = []
        self.drafts: list[str] = []
        self.interrupt_at: int | None = None

    def __call__(self, model: Any, spec: Any, sample: Any, layout: Any, around: Any) -> Any:
        if len(self.domains) == self.interrupt_at:
            raise KeyboardInterrupt
        (self.domains if around is None else self.drafts).append(sample.domain)
        return sample_influence(model, spec, sample, layout, around)


@pytest.fixture
def profiler(monkeypatch: pytest.MonkeyPatch) -> Profiler:
    made = Profiler()
    monkeypatch.setattr("moac.pipeline.stages.sample_influence", made)
    return made


def recompile(made: Compiled, out: Path, **changes: Any) -> CompileResult:
    """Another compile in the same work folder."""
    return compile_model(made.checkpoint, out, request=request(**changes), work_dir=made.work_dir)


def inspected(package: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert moac_command("inspect", package, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def new_tensor_bytes(make: Callable[[], object]) -> int:
    """Bytes of the storages behind the tensors of 3 or more axes that `make()` leaves alive."""
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if type(thing) is torch.Tensor}
    kept = make()
    made = [
        thing
        for thing in gc.get_objects()
        if type(thing) is torch.Tensor and id(thing) not in before and thing.ndim >= 3
    ]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}
    del kept
    return sum(storages.values())


def decoder_of(artifact: Artifact, dtype: torch.dtype) -> Decoder:
    return Decoder(artifact.spec, load_weights(artifact, dtype), dtype=dtype)


# ---- every family


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("smollm3", "granite") else ())
        for name in MODELS
    ],
)
def test_a_checkpoint_becomes_a_package_that_does_what_the_original_does(
    tiny_checkpoint: Make, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = tiny_checkpoint(family, **MODELS[family]), tmp_path / "out"
    arguments = [*options(), "--work-dir", tmp_path / "work", "--json"]
    assert moac_command("compile", checkpoint, "-o", out, "--budget", "0.5", *arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["checks"]
    assert all(check["ok"] for check in summary["checks"])

    found = inspected(out, capsys)
    assert set(INSPECTED) <= set(found)
    assert found["lengths"] == [512, 768, 1536]
    assert [len(layer) for layer in found["rules"]] == [2, 2]
    for planned in map(str, found["lengths"]):
        size = found["kv_bytes"][planned]
        assert size["held"] / size["dense"] == pytest.approx(found["density"][planned])
        assert size["held"] <= 0.5 * size["dense"]

    lengths = ["--lengths", "64,600,1000"]
    assert moac_command("verify", out, "--source", checkpoint, *lengths, "--json") == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["ok"] is True
    names = [check["name"] for check in verdict["checks"]]
    for length in (64, 600, 1000):
        for part in ("prefill", "decode"):
            assert f"source {length} tokens float32: {part}" in names
    assert all(check["limit"] <= 2e-3 for check in verdict["checks"] if "source" in check["name"])
    assert "source 1000 tokens float32: sparse differs from dense by" in names

    answering = ["--prompt", "Remember the key.", "--max-tokens", "4", "--json"]
    assert moac_command("run", out, *answering) == 0
    answer = json.loads(capsys.readouterr().out)
    assert 1 <= len(answer["token_ids"]) <= 4
    assert answer["finish_reason"] in ("stop", "length")
    check_reported_bytes(out, answer)


def check_reported_bytes(package: Path, answer: dict[str, Any]) -> None:
    """What `run` says it holds is what the plan says, at the capacity of its session."""
    artifact, capacity = open_artifact(package), answer["capacity"]
    token = artifact.spec.kv_token_bytes(torch.finfo(getattr(torch, answer["dtype"])).bits // 8)
    whole = artifact.plan.undropping()
    assert answer["stats"]["kv_bytes"] == {
        "held": artifact.plan.held_tokens(capacity) * token,
        "dense": whole.held_tokens(capacity) * token,
    }


def test_verify_compares_with_the_original_and_not_with_itself(
    tiny_package: Compiled,
) -> None:
    """The reference of `verify` agrees with the oracle of these tests, written apart from it."""
    artifact = open_artifact(tiny_package.package)
    checkpoint = open_checkpoint(str(tiny_package.checkpoint))
    tokens = [(7 * i * i + i) % artifact.spec.vocab_size for i in range(600)]
    wanted = oracle_logits(checkpoint.load_model("float32"), tokens, artifact.plan, len(tokens))
    session = TorchSession(decoder_of(artifact, torch.float32), artifact.plan, artifact.head_order)
    row = Batch(session, batch=1, capacity=len(tokens))
    prefill, decode = row.each([tokens[:500]])[0], row.by_decode([tokens[500:]])[0]
    assert (torch.cat([prefill, decode]) - wanted).abs().max() <= 2e-3


# ---- memory


def test_held_bytes_are_those_of_the_tensors_allocated(
    tiny_package: Compiled, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspected(tiny_package.package, capsys)
    artifact = open_artifact(tiny_package.package)
    decoder = decoder_of(artifact, getattr(torch, artifact.dtype))
    for length in found["lengths"]:
        order = artifact.head_order
        admitting = partial(TorchSession(decoder, artifact.plan, order).admit, length)
        allocated = new_tensor_bytes(admitting)
        size = found["kv_bytes"][str(length)]
        assert allocated == size["held"] <= 0.5 * size["dense"]


# ---- budgets and options


def test_without_a_cut_the_text_is_the_originals(tiny_package: Compiled, out: Path) -> None:
    recompile(tiny_package, out, budget=1.0)
    package = moac_runtime.load(out, dtype="float32")
    checkpoint = open_checkpoint(str(tiny_package.checkpoint))
    original: Any = checkpoint.load_model("float32")
    tokenizer = checkpoint.load_tokenizer()
    prompts = ["The", "Remember the key, then answer", "hidden in the text " * 40]
    answers = package.generate(prompts, raw=True, max_tokens=24, temperature=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        wanted = original.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert list(answer.token_ids) == wanted.tolist()
        text = tokenizer.decode(wanted, skip_special_tokens=True)
        assert answer.text == text.rstrip("\ufffd")  # a last character may be cut in the middle


def test_rules_per_layer_limits_the_distinct_rules(tiny_package: Compiled, out: Path) -> None:
    free = open_artifact(tiny_package.package).plan
    assert max(len(set(layer)) for layer in free.rules) == 2
    limited = recompile(tiny_package, out, rules_per_layer=1).plan
    assert [len(set(layer)) for layer in limited.rules] == [1, 1]
    assert all(limited.density(n) <= 0.5 for n in range(512, CONTEXT + 1))


def test_the_users_own_samples_are_profiled(
    tiny_package: Compiled, out: Path, profiler: Profiler, tmp_path: Path
) -> None:
    lines = [
        {"prompt": "The key is hidden. What is hidden?", "response": "the key"},
        {"messages": [{"role": "user", "content": "answer with the key"}]},
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    result = recompile(tiny_package, out, calibration=file)
    assert profiler.domains == ["user"]
    assert profiler.drafts.count("user") == 1
    assert result.record["budget"] == 0.5


def test_dtype_and_shards_are_as_asked(tiny_package: Compiled, out: Path) -> None:
    recompile(tiny_package, out, dtype="bfloat16", max_shard_size=60_000)
    artifact = open_artifact(out)
    assert artifact.dtype == "bfloat16"
    assert len(list((out / "weights").glob("*.safetensors"))) > 2
    assert all(check.ok for check in verify(out))


@pytest.mark.parametrize(
    ("family", "overrides", "dtype"),
    [("llama", {}, None), ("gemma3_text", {"hidden_size": 96}, "bfloat16")],
)
def test_a_gguf_compiles(
    tmp_path: Path, out: Path, family: str, overrides: dict[str, Any], dtype: str | None
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, family=family, overrides=overrides)
    asked = request(lengths=(448,), dtype=dtype)
    result = compile_model(file, out, request=asked, work_dir=tmp_path / "work")
    assert all(check.ok for check in result.checks)
    artifact = open_artifact(out)
    assert artifact.provenance["source"] == "tiny.gguf"
    assert all(artifact.plan.density(n) <= 0.5 for n in range(448, artifact.capacity + 1))
    checks = list(verify(out, checkpoint=open_checkpoint(str(file)), lengths=(64, 400)))
    assert all(check.ok for check in checks)


# ---- long work


def test_an_interrupted_compile_goes_on_where_it_stopped(
    tiny_package: Compiled,
    out: Path,
    profiler: Profiler,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    command = ["compile", tiny_package.checkpoint, "-o", out, *options()]
    command += ["--work-dir", tmp_path / "work"]
    profiler.interrupt_at = 3
    assert moac_command(*command) == 130
    assert "interrupted; run the same command again to go on" in capsys.readouterr().err
    assert not out.exists()

    profiler.interrupt_at = None
    assert moac_command(*command) == 0
    # at each of two lengths text and documents once, retrieval twice, the second around a draft
    assert len(profiler.domains) == 6
    assert profiler.drafts == ["retrieval"] * 2
    assert rules_of(out) == rules_of(tiny_package.package)


KILLED_WHILE_WRITING = """
import os, signal, sys
import torch
from moac import compile_model
from moac.pipeline import compiler
from tiny import request
torch.set_num_threads(1)
compiler.write_plan = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint, out, work = sys.argv[1:]
compile_model(checkpoint, out, request=request(), work_dir=work, force=True)
"""


def test_a_kill_in_the_middle_of_writing_leaves_the_target_untouched(
    tiny_package: Compiled, out: Path, profiler: Profiler
) -> None:
    work = tiny_package.work_dir
    shutil.copytree(tiny_package.package, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, tiny_package.checkpoint, out, work],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == -9, done.stderr.decode()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert len(list(out.parent.iterdir())) == 2  # the package, and what the dead one was writing
    compile_model(tiny_package.checkpoint, out, request=request(), work_dir=work, force=True)
    assert list(out.parent.iterdir()) == [out]
    assert profiler.domains == []


def test_another_budget_reuses_the_profile(
    tiny_package: Compiled, out: Path, profiler: Profiler
) -> None:
    plan = recompile(tiny_package, out, budget=0.3).plan
    assert profiler.domains == []
    assert set(profiler.drafts) == {"retrieval"}
    assert all(plan.density(length) <= 0.3 for length in range(512, CONTEXT + 1))


def test_the_same_seed_gives_the_same_plan(
    tiny_package: Compiled, out: Path, tmp_path: Path
) -> None:
    made = [
        compile_model(tiny_package.checkpoint, out, request=request(), work_dir=tmp_path / "w"),
        recompile(tiny_package, tmp_path / "again"),
    ]
    for name in ("plan.json", "golden.safetensors", "report.html", "moac.json"):
        first, second = ((result.path / name).read_bytes() for result in made)
        assert first == second, name


def test_a_dry_run_writes_nothing(
    tiny_package: Compiled, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compile", tiny_package.checkpoint, "-o", out, *options(), "--dry-run"]
    assert moac_command(*command, "--json") == 0
    stages_told = json.loads(capsys.readouterr().out)
    names = [stage["name"] for stage in stages_told]
    planning = ["load", "rehearse", "calibrate", "profile", "predict", "refine", "optimise"]
    assert names == [*planning, "validate", "emit", "verify"]
    assert all(stage["seconds"] > 0 and stage["memory_bytes"] > 0 for stage in stages_told)
    assert not out.exists()


# ---- the package by itself


def test_the_package_runs_itself(tiny_package: Compiled, tmp_path: Path) -> None:
    asked = ["--prompt", "Remember the key.", "--max-tokens", "6", "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-I", tiny_package.package, *asked, "--json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    model = moac_runtime.load(tiny_package.package, dtype="float32")
    (answer,) = model.generate("Remember the key.", max_tokens=6, temperature=0)
    assert json.loads(done.stdout)["token_ids"] == list(answer.token_ids)


def plan_file(package: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((package / "plan.json").read_text())
    return data


def rules_of(package: Path) -> Plan:
    return open_artifact(package).plan
