"""The onnx target on a real model, on a bare host, and from JavaScript (minutes, packages)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Compiled, request

import moac_runtime
from moac import compile_model
from moac.calibration import plain_text_windows
from moac.checkpoint import Checkpoint, open_checkpoint
from moac.export.write import write_onnx
from moac.packaging.fuse import head_order, pack_weights
from moac.packaging.writer import embed_runtime, write_manifest, write_plan, write_weights
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / ".cache" / "smollm2-135m-instruct"
CLIENT = ROOT / "examples" / "onnx_client.mjs"
PROMPT = "Remember the key. The key is under the mat. " * 12


@pytest.fixture(scope="module")
def onnx_package(tiny_package: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny package built for onnx alone, whose rings wrap within `PROMPT`."""
    out = tmp_path_factory.mktemp("onnx") / "out"
    asked = request(targets=("onnx",))
    compile_model(tiny_package.checkpoint, out, request=asked, work_dir=tiny_package.work_dir)
    return out


def write_package(checkpoint: Checkpoint, plan: Plan, folder: Path) -> Path:
    """A package of a plan of our own, for torch and onnx."""
    spec, order = checkpoint.spec, head_order(plan)
    folder.mkdir()
    weights = pack_weights(checkpoint.tensor, spec, order)
    write_weights(folder, weights, dtype=getattr(torch, checkpoint.dtype))
    write_plan(folder, plan, {})
    checkpoint.save_tokenizer(folder / "tokenizer")
    choices: Any = {"dtype": "float32", "capacity": spec.context, "weights": "shared"}
    write_onnx(folder, spec=spec, plan=plan, head_order=order, **choices)
    embed_runtime(folder)
    shape: Any = {"capacity": spec.context, "head_order": order, "dtype": checkpoint.dtype}
    records: Any = {"provenance": {}, "verification": {}}
    write_manifest(folder, model=spec, targets=["torch", "onnx"], **shape, **records)
    return folder


def test_greedy_answers_of_smollm2_are_the_torch_backends(tmp_path: Path) -> None:
    script = ROOT / "examples" / "fetch_smollm2.py"
    subprocess.run([sys.executable, script, CHECKPOINT], check=True, timeout=600)
    checkpoint = open_checkpoint(str(CHECKPOINT))
    spec = checkpoint.spec
    spans = (128, 192, 256, 384)  # no head sees further than 384 tokens
    rules = tuple(
        tuple(Rule(spans[(layer + head) % 4], 0.0) for head in range(spec.num_kv_heads))
        for layer in range(spec.num_layers)
    )
    plan = Plan(rules, sink=64, block=64, min_span=128, windows=spec.windows)
    package = write_package(checkpoint, plan, tmp_path / "out")
    tokenizer = checkpoint.load_tokenizer()
    windows = plain_text_windows(tokenizer, 500, 10, 0)
    long = [tokenizer.decode(window, skip_special_tokens=True) for window in windows]
    short = [" ".join(text.split()[:12]) for text in long]
    asked: Any = {"max_tokens": 64, "raw": True, "temperature": 0}
    found, wanted = (
        moac_runtime.load(package, backend=backend, dtype="float32").generate(
            [*long, *short], **asked
        )
        for backend in ("onnx", "torch")
    )
    assert max(answer.prompt_tokens for answer in found) > max(spans)
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
    assert sum(len(a.token_ids) for a in found) > 20 * 48
    assert found[0].stats.kv_held_bytes == wanted[0].stats.kv_held_bytes


def test_a_host_with_four_libraries_runs_the_package(onnx_package: Path, tmp_path: Path) -> None:
    host = tmp_path / "host"
    venv.create(host, with_pip=True)
    python = host / "bin" / "python"
    libraries = ["onnxruntime", "tokenizers", "jinja2", "numpy"]
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *libraries], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"the libraries cannot be installed here: {done.stderr.splitlines()[-1:]}")
    asked = ["--prompt", PROMPT, "--max-tokens", "16", "--json"]
    done = subprocess.run(
        [python, onnx_package, *asked],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (wanted,) = moac_runtime.load(onnx_package).generate(PROMPT, max_tokens=16, temperature=0)
    found = json.loads(done.stdout)
    assert found["token_ids"] == list(wanted.token_ids)
    assert found["backend"] == "onnx"


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the JavaScript client runs."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("javascript")
    # without scripts: the one of onnxruntime-node only fetches GPU libraries
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"]
    packages = ["onnxruntime-node", "@huggingface/tokenizers"]
    done = subprocess.run([*command, *packages], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm cannot install {' and '.join(packages)}: {done.stderr[-200:]}")
    shutil.copy(CLIENT, folder)
    return folder


def test_the_javascript_client_gives_the_same_tokens(javascript: Path, onnx_package: Path) -> None:
    assert_same_tokens(javascript, onnx_package)


@pytest.mark.parametrize(
    ("family", "options"),
    [("gemma3_text", {}), ("phi3", {"rope": "longrope"}), ("llama", {"rope": "dynamic"})],
)
def test_the_javascript_client_rotates_as_every_kind_does(
    javascript: Path, tiny_checkpoint: Any, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    """Two tables, factors of long contexts, a part of a head, frequencies of the capacity."""
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, **options)))
    spec = checkpoint.spec
    rules = ((Rule(16, 0.0),) * spec.num_kv_heads,) * spec.num_layers
    plan = Plan(rules, sink=4, block=4, min_span=8, windows=spec.windows)
    assert_same_tokens(javascript, write_package(checkpoint, plan, tmp_path / "out"))


def assert_same_tokens(javascript: Path, package: Path) -> None:
    """Of the client in JavaScript and of the runtime."""
    done = subprocess.run(
        ["node", CLIENT.name, package, PROMPT, "24"],
        cwd=javascript,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (wanted,) = moac_runtime.load(package, backend="onnx").generate(
        PROMPT, raw=True, max_tokens=24, temperature=0
    )
    assert len(found["prompt_ids"]) == wanted.prompt_tokens
    assert found["token_ids"] == list(wanted.token_ids)
    assert found["kv_bytes"] == wanted.stats.kv_held_bytes < wanted.stats.kv_dense_bytes
