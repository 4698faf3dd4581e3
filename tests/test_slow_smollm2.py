"""The real path: SmolLM2-135M-Instruct compiled at half the KV memory (minutes, one model)."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Compiled

import moac_runtime
from moac import CompileRequest, compile_model
from moac.checkpoint import open_checkpoint
from moac.pipeline.verify import verify
from moac.show.inspection import inspect_package
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.weights import load_weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / ".cache" / "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
PROMPTS = [
    QUESTION,
    "What is the capital of Japan?",
    "Name three primary colours.",
    "Write a short poem about rain.",
    "Explain what a prime number is.",
    "How many days does a week have?",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What is the boiling point of water?",
    "Translate 'good morning' to French.",
    "List five animals that can fly.",
    "Why is the sky blue?",
    "What does a compiler do?",
    "Tell me a joke about cats.",
    "Describe a sunset over the sea.",
    "What is 12 times 12?",
    "Name the largest planet of the solar system.",
    "How do bees make honey?",
    "Write a Python function that adds two numbers.",
    "Summarise the story of Little Red Riding Hood.",
]


@pytest.fixture(scope="module", autouse=True)
def _all_threads() -> Any:
    """The tiny tests hold torch to one thread; a real model wants every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    script = ROOT / "examples" / "fetch_smollm2.py"
    subprocess.run([sys.executable, script, CHECKPOINT], check=True, timeout=600)
    return CHECKPOINT


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Compiled as `make quickstart` does; stages already in the user's work folder are reused."""
    from moac.store.work_dir import default_work_dir

    made = Compiled(checkpoint, tmp_path_factory.mktemp("smollm2") / "out", default_work_dir())
    compile_model(checkpoint, made.package, request=CompileRequest(budget=0.5))
    return made


def run_moac(*arguments: object) -> str:
    """Standard output of `moac ARGUMENTS` in a process of its own."""
    command = [str(Path(sys.executable).parent / "moac"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_answer_names_paris(compiled: Compiled) -> None:
    assert "Paris" in run_moac("run", compiled.package, "--prompt", QUESTION)


def test_the_package_answers_by_itself(compiled: Compiled, tmp_path: Path) -> None:
    command = [sys.executable, str(compiled.package), "--prompt", QUESTION, "--json"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert "Paris" in json.loads(done.stdout)["text"]


def test_half_of_the_memory_is_held_at_every_planned_length(compiled: Compiled) -> None:
    found = inspect_package(compiled.package)
    artifact = open_artifact(compiled.package, check="sizes")
    kind = getattr(torch, artifact.dtype)
    decoder = Decoder(artifact.spec, load_weights(artifact, kind), dtype=kind)
    assert found["lengths"]
    session = TorchSession(decoder, artifact.plan, artifact.head_order)
    for length in found["lengths"]:
        size = found["kv_bytes"][str(length)]
        held = session.kv_bytes(session.admit(length))
        assert held == size["held"] <= 0.5 * size["dense"]


def test_logits_are_the_originals_under_the_same_masks(compiled: Compiled) -> None:
    checkpoint = open_checkpoint(str(compiled.checkpoint))
    checks = list(verify(compiled.package, checkpoint=checkpoint, lengths=(64, 1000, 4000)))
    assert [check.name for check in checks if not check.ok] == []
    limits = {check.name: check.limit for check in checks if check.name.startswith("source ")}
    for length in (64, 1000, 4000):
        for part in ("prefill", "decode"):
            assert limits[f"source {length} tokens float32: {part}"] <= 2e-3
    assert "source 4000 tokens float32: sparse differs from dense by" in limits


def test_without_a_cut_the_texts_are_the_originals(compiled: Compiled, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Nothing is dropped, so nothing need be measured: the least of everything.
    request = CompileRequest(budget=1.0, lengths=(512,), samples=1, plans=1, dtype="float32")
    compile_model(compiled.checkpoint, out, request=request, work_dir=compiled.work_dir)
    answers = moac_runtime.load(out).generate(PROMPTS, max_tokens=64, temperature=0)
    checkpoint = open_checkpoint(str(compiled.checkpoint))
    original: Any = checkpoint.load_model("float32")
    tokenizer = checkpoint.load_tokenizer()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        wanted = greedy(original, tokenizer, prompt)
        assert list(answer.token_ids) == wanted, prompt
        assert answer.text == tokenizer.decode(wanted, skip_special_tokens=True)


def greedy(original: Any, tokenizer: Any, prompt: str) -> list[int]:
    """What transformers itself answers in 64 tokens."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
    )
    given = asked["input_ids"].shape[1]
    found: list[int] = original.generate(**asked, max_new_tokens=64, do_sample=False)[0].tolist()
    return found[given:]


READ_WEIGHTS = """
import sys, torch
for name in sys.argv[1:]:
    with open(name, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
"""


def test_a_cold_start_costs_little_more_than_torch_and_the_weights(compiled: Compiled) -> None:
    weights = sorted((compiled.package / "weights").glob("*.safetensors"))
    run = [str(Path(sys.executable).parent / "moac"), "run", str(compiled.package)]
    run += ["--prompt", "hi", "--max-tokens", "1"]
    bare = [sys.executable, "-c", READ_WEIGHTS, *map(str, weights)]
    seconds(run), seconds(bare)  # the file cache is warm from here
    pairs = [(seconds(run), seconds(bare)) for _ in range(7)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert ours <= 1.5 * theirs, f"{ours:.2f} s against {theirs:.2f} s"


def seconds(command: Sequence[str]) -> float:
    """Wall time of a process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return time.perf_counter() - started


def test_the_commands_of_the_readme_run(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In sequence and as written; the compiles in them reuse the stages of the one above."""
    from test_readme import CHECKPOINT as place
    from test_readme import shell_commands

    (tmp_path / ".cache").mkdir()
    (tmp_path / place).symlink_to(compiled.checkpoint)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "constraints.txt").symlink_to(ROOT / "constraints.txt")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("MOAC_CACHE", str(compiled.work_dir))
    for command in shell_commands():
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
