"""Every instruction set's kernels as programs of their own; arm64's in an emulator on x86-64.

The slow ones run under the address and the undefined-behaviour sanitizer: `make test-memory`.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kv_rounding import held, rotated, stored
from safetensors.torch import load_file
from tiny import CONTEXT, Compiled, request

from moac import compile_model
from moac_kernels.cpu_build import INSTRUCTION_SETS, SOURCES, find_compiler, host_sets
from moac_runtime.backends.cpu.library import INSTRUCTION_SETS as FEATURES
from moac_runtime.backends.cpu.library import host_features
from moac_runtime.backends.layout import head_runs, packed_spans, rope_tables
from moac_runtime.backends.session import Feed
from moac_runtime.backends.torch.opening import open_torch
from moac_runtime.package.artifact import Artifact, open_artifact
from moac_runtime.package.golden import load_golden
from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule

TESTS = Path(__file__).parent
EMULATOR = "qemu-aarch64"
# What a driver leaves at its end is no fault; a read past an array of its own size is one.
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SANITIZERS += ("-fno-omit-frame-pointer",)
NO_LEAKS = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
FORMATS = {"int8": 1, "int4": 2}
KV_FORMATS = {None: 0, 8: 1, 4: 2}
Run = Callable[..., str]


def obstacle(name: str) -> str | None:
    """Why programs for an instruction set cannot be built and run here; None where they can."""
    if find_compiler(name) is None:
        return f"there is no compiler for {name} here"
    if name in host_sets():
        lacking = FEATURES[name] - host_features()
        return f"this processor has no {name}" if lacking else None
    return None if shutil.which(EMULATOR) else f"there is no {EMULATOR} here"


def sanitized(name: str) -> Any:
    return pytest.param((name, True), marks=pytest.mark.slow, id=f"{name}-sanitized")


RUNS = [*(pytest.param((name, False), id=name) for name in INSTRUCTION_SETS)]
RUNS += map(sanitized, host_sets())


@pytest.fixture(params=RUNS, scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run(driver, *words)`: what a driver of this folder prints, built for an instruction set."""
    name, checked = request.param
    if reason := obstacle(name):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp(name)
    extra = SANITIZERS if checked else ("-O2", "-static")
    emulator = [] if name in host_sets() else [EMULATOR]

    def start(driver: str, *words: object) -> str:
        program = folder / driver
        if not program.exists():
            flags = ("-std=c++17", "-pthread", *extra, *INSTRUCTION_SETS[name])
            include = ("-I", str(SOURCES))
            source = str(TESTS / f"{driver}.cpp")
            command = [str(find_compiler(name)), *flags, *include, source, "-o", str(program)]
            built = subprocess.run(command, capture_output=True, text=True)
            assert built.returncode == 0, built.stderr
        done = subprocess.run(
            [*emulator, str(program), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=300,
            env=NO_LEAKS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return start


def test_whole_numbers_are_multiplied_exactly(run: Run) -> None:
    assert run("whole_numbers") == "exact\n"


@pytest.fixture(scope="module", params=["full", "int8", "int4"])
def package(
    request: Any,
    tiny_checkpoint: Callable[..., Path],
    tiny_package: Compiled,
    tmp_path_factory: Any,
) -> Path:
    source = tiny_checkpoint("llama", max_position_embeddings=CONTEXT, head_dim=32)
    out: Path = tmp_path_factory.mktemp("sets") / "out"
    asked = request_of(request.param)
    compile_model(source, out, request=asked, work_dir=tiny_package.work_dir)
    return out


def request_of(weights: str) -> Any:
    return request(weights=weights, targets=("torch",), dtype="bfloat16")


def integers(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def described(
    artifact: Artifact,
    tokens: Sequence[int],
    capacity: int,
    *,
    bf16: bool,
    plan: Plan | None = None,
) -> bytes:
    """The package for `golden_logits.cpp`, in bfloat16 or widened to float32.

    `plan`: None is its own.
    """
    spec = artifact.spec
    layer = spec.kinds[0]
    (shard,) = (artifact.root / "weights").glob("*.safetensors")
    tensors = load_file(shard)
    kinds = ("embed", "qkv", "o", "gate_up", "down", "lm_head")
    formats = [FORMATS.get(artifact.weight_formats.get(kind, ""), 0) for kind in kinds]
    shape = (spec.num_layers, spec.hidden_size, layer.intermediate_size, spec.num_heads)
    rest = (spec.num_kv_heads, spec.head_dim, spec.vocab_size, bf16, spec.tied_embeddings)
    parts = [integers((*shape, *rest, len(tokens), *formats, *tokens))]
    for heads in packed_spans(plan or artifact.plan, artifact.head_order, capacity):
        runs = head_runs(heads)
        parts.append(integers([len(runs)]))
        for found in runs:
            head = found.layout.head
            cache = (found.first, found.num_heads, head.size, head.sink)
            parts.append(integers([*cache, KV_FORMATS[head.bits]]))
    (table,) = rope_tables(spec.ropes, spec.head_dim, capacity)
    parts.append(np.array([*table, spec.norm.eps], dtype="<f4").tobytes())

    def add(name: str) -> None:
        matrix = tensors[f"{name}.weight"]
        narrow = matrix.dtype in (torch.int8, torch.uint8)
        parts.append(_bytes(matrix if narrow or bf16 else matrix.float()))
        if len(matrix.shape) == 2:
            parts.append(_bytes(tensors[f"{name}.scale"]) if narrow else integers([0]))

    add("embed")
    for index in range(spec.num_layers):
        for part in ("attn_norm", "qkv", "o", "mlp_norm", "gate_up", "down"):
            add(f"layers.{index}.{part}")
    add("norm")
    if not spec.tied_embeddings:
        add("lm_head")
    return b"".join(parts)


def _bytes(tensor: torch.Tensor) -> bytes:
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return integers([len(data)]) + data


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_golden_logits_are_those_of_the_package(
    run: Run, package: Path, tmp_path: Path, bf16: bool
) -> None:
    artifact = open_artifact(package)
    limits = artifact.verification["limits"]
    narrow = artifact.weights != "full"
    limit = limits[("activations" if narrow else "bfloat16") if bf16 else "float32"]
    for prompt in load_golden(artifact):
        tokens = prompt.tokens.tolist()
        model, out = tmp_path / "model", tmp_path / "logits"
        model.write_bytes(described(artifact, tokens, prompt.capacity, bf16=bf16))
        run("golden_logits", model, out, 8, 2)
        logits = torch.from_numpy(np.fromfile(out, dtype="<f4")).view(len(tokens), -1)
        error = float((logits[prompt.positions] - prompt.logits).abs().max())
        assert error <= limit


@pytest.mark.parametrize("package", ["full"], indirect=True)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_logits_over_rounded_keys_are_those_of_torch(
    run: Run, package: Path, tmp_path: Path, bits: int, bf16: bool
) -> None:
    artifact = open_artifact(package)
    prompt = load_golden(artifact)[0]
    tokens = prompt.tokens.tolist()
    plan = artifact.plan
    # the first head of every layer stays as it is, beside one that is rounded
    rules = tuple(
        tuple(Rule(rule.alpha, rule.beta, bits if head else None) for head, rule in enumerate(own))
        for own in plan.rules
    )
    mixed = replace(plan, rules=rules)

    def wanted(under: Plan, dtype: str = "float32") -> torch.Tensor:
        session = open_torch(artifact, dtype=dtype).session(under)
        row = session.admit(prompt.capacity)
        return torch.as_tensor(session.step([Feed(row, tokens, range(len(tokens)))]))

    exact = wanted(mixed)
    model, out = tmp_path / "model", tmp_path / "logits"
    model.write_bytes(described(artifact, tokens, prompt.capacity, bf16=bf16, plan=mixed))
    run("golden_logits", model, out, 8, 2)
    found = torch.from_numpy(np.fromfile(out, dtype="<f4")).view(len(tokens), -1)
    # a number that lies halfway between two codes may go either way
    limit = 0.1 * (exact - wanted(plan)).norm()
    assert limit > 0
    if bf16:
        limit = 1.5 * (exact - wanted(mixed, "bfloat16")).norm()
    assert (found - exact).norm() < limit


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, cap: float, bits: int) -> np.ndarray:
    """Softmax of `q` `[G, D]` over what was held of `k` and `v` `[N, D]`, in powers of two."""
    turned = rotated(q) if bits == 4 else q
    scores = turned.astype(np.float64) @ k.T
    scores = cap * np.tanh(scores / cap) if cap else scores
    weights = np.exp2(scores - scores.max(-1, keepdims=True))
    out = (weights @ v / weights.sum(-1, keepdims=True)).astype(np.float32)
    return rotated(out) if bits == 4 else out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("head_dim", "group", "tokens", "cap"),
    [(16, 1, 1, 0), (32, 5, 63, 0), (64, 3, 200, 0), (80, 2, 65, 9), (96, 4, 130, 0),
     (128, 7, 97, 0), (256, 1, 70, 5)],
)  # fmt: skip
def test_rounded_keys_and_attention_are_those_of_the_format(
    run: Run,
    tmp_path: Path,
    bits: int,
    bf16: bool,
    head_dim: int,
    group: int,
    tokens: int,
    cap: float,
) -> None:
    rng = np.random.default_rng(head_dim)
    # scores spread over some powers of two, one number of a head far larger than the others
    shapes = ((group, head_dim), (tokens, head_dim), (tokens, head_dim))
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    q *= np.float32(4 / head_dim**0.5)
    k[:, 3] *= 20
    k[0], v[tokens // 2], v[tokens - 1] = 0, 0.37, -1e-3
    if bf16:
        q, k, v = (torch.from_numpy(x).bfloat16().float().numpy() for x in (q, k, v))
    model, out = tmp_path / "given", tmp_path / "found"
    sizes = integers([bits, head_dim, group, tokens, bf16])
    given = np.concatenate([[cap], q.ravel(), k.ravel(), v.ravel()]).astype("<f4")
    model.write_bytes(sizes + given.tobytes())
    run("kv_attention", model, out)

    shape = KvShape(head_dim, 2 if bf16 else 4)
    memory = out.read_bytes()
    floats = []
    for x in (k, v):
        codes, scales = stored(x, bits)
        raw = codes.tobytes()
        narrow = torch.from_numpy(scales).bfloat16().view(torch.uint8).numpy().tobytes()
        size = shape.codes(tokens, bits)
        assert memory[: len(raw)] == raw
        assert memory[size : size + len(narrow)] == narrow
        memory = memory[size + shape.scales(tokens, bits) :]
        floats.append(held(codes, scales, head_dim))
    rest = np.frombuffer(memory, "<f4")
    for wanted in floats:
        found, rest = rest[: wanted.size].reshape(wanted.shape), rest[wanted.size :]
        np.testing.assert_allclose(found, wanted, rtol=3e-7, atol=3e-7 * abs(wanted).max())
    wanted = attention(q, *floats, cap, bits)
    exact, whole = rest.reshape(2, group, head_dim)
    np.testing.assert_allclose(exact, wanted, rtol=0, atol=2e-5 * abs(wanted).max())
    # queries and weights of 15 bits
    np.testing.assert_allclose(whole, wanted, rtol=0, atol=3e-3 * abs(wanted).max())
