"""Benchmarks of tiny models: rows that add up, numbers that mean what they say, refusals."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cpu_kernels import needs_compiler
from families import FAMILIES
from tiny import Compiled, moac_command
from torch.nn.functional import scaled_dot_product_attention

from moac.bench import availability, memory, runner, shapes
from moac.bench.floor import floor_ms, kv_bytes_read, weight_bytes_read
from moac.bench.machine import peak_bytes, read_bandwidth_gbs
from moac.bench.open import open_system
from moac.bench.plans import random_plan, system_plan
from moac.bench.request import SYSTEMS, BenchRequest
from moac.bench.result import percentile
from moac.bench.runner import choose_systems, run_bench, with_backend
from moac.bench.shapes import SHAPES, shape_spec
from moac.bench.system import Subject
from moac.bench.transformers_cache import GrowingCache
from moac.bench.worker import Load, Running, Worker
from moac_kernels.reference import masked_attention
from moac_runtime.backends.cpu.library import runnable_sets
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import HeadSpan, visible
from moac_runtime.package.spec import ModelSpec

Capture = pytest.CaptureFixture[str]

TINY = {
    **SHAPES["smollm2-135m"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
CONTEXT, TOKENS = 600, 8
CAPACITY = CONTEXT + TOKENS
KEYS = {
    *("system", "batch", "context", "dtype", "density", "byte_share", "prefill_s"),
    *("decode_ms_p50", "decode_ms_p95", "tokens_per_s", "kv_bytes", "peak_bytes", "floor_ms"),
}


def subject_of(compiled: Compiled, **changes: object) -> Subject:
    """The tiny package as a system gets it, in float32 with its own plan."""
    artifact = open_artifact(compiled.package)
    subject = Subject(
        spec=artifact.spec,
        plan=artifact.plan,
        dtype="float32",
        device="cpu",
        backend="torch",
        cpu=None,
        package=compiled.package,
        source=str(compiled.checkpoint),
        shape=None,
        gguf=None,
        threads=1,
        seed=0,
    )
    return replace(subject, **changes)  # type: ignore[arg-type]


def plan_of(name: str, compiled: Compiled, capacity: int = CAPACITY) -> Plan:
    artifact = open_artifact(compiled.package)
    return system_plan(name, artifact.plan, capacity, artifact.kv)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    return shape_spec("tiny")


def test_a_run_reports_every_system(
    tiny_package: Compiled, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "bench.json"
    code = moac_command(
        *("bench", tiny_package.package, "--source", tiny_package.checkpoint),
        *("--against", "hf,dense", "--batch", 2, "--context", CONTEXT, "--tokens", TOKENS),
        *("--threads", 1, "--json", target),
    )
    out, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads(target.read_text(encoding="utf-8"))
    rows = {row["system"]: row for row in found["rows"]}
    assert list(rows) == ["moac", "hf", "dense"]
    assert all(row.keys() >= KEYS for row in rows.values())
    assert found["machine"]["cores"] >= 1
    assert found["read_bandwidth_gbs"] > 0
    assert found["versions"]["torch"] == torch.__version__
    for row in rows.values():
        assert 0 < row["decode_ms_p50"] <= row["decode_ms_p95"]
        assert row["tokens_per_s"] == pytest.approx(2000 / row["decode_ms_p50"])
        assert row["prefill_s"] > 0
        assert row["floor_ms"] == pytest.approx(
            row["read_bytes"] / found["read_bandwidth_gbs"] / 1e6
        )
        assert row["peak_bytes"] > 50 << 20  # a process with torch in it
    held = open_artifact(tiny_package.package).plan.density(CAPACITY)
    assert rows["moac"]["density"] == rows["moac"]["byte_share"] == held < 1
    assert rows["moac"]["kv_bytes"] == pytest.approx(held * rows["dense"]["kv_bytes"])
    # transformers holds no slot for the last chosen token, which is never fed
    assert rows["hf"]["kv_bytes"] == rows["dense"]["kv_bytes"]
    assert rows["moac"]["floor_ms"] < rows["dense"]["floor_ms"] == rows["hf"]["floor_ms"]
    assert out.splitlines()[2].split()[:4] == ["system", "batch", "context", "dtype"]
    assert "bandwidth: done" in err


def test_a_shape_needs_no_package(tiny_shape: ModelSpec, tiny_package: Compiled) -> None:
    spec = tiny_shape
    plan = random_plan(spec, density=0.5, capacity=CAPACITY, seed=0)
    subject = subject_of(tiny_package, spec=spec, plan=plan, package=None, source=None)
    subject = replace(subject, shape="tiny")
    load = Load(batch=2, context=CONTEXT, capacity=CAPACITY, seed=0)
    for name in ("moac", "hf"):
        running = Running(open_system(name, subject), subject, load)
        assert running.prefill() > 0
        assert len(running.decode(TOKENS)) == TOKENS
        dense = 2 * CAPACITY * spec.num_layers * spec.num_kv_heads * spec.kv_token_bytes(4)
        share = plan.density(CAPACITY) if name == "moac" else 1
        assert running.usage().kv_bytes == pytest.approx(share * dense)


def test_our_row_and_transformers_choose_the_same_tokens(tiny_package: Compiled) -> None:
    load = Load(batch=2, context=24, capacity=32, seed=0)  # everything is dense this short
    chosen = []
    for name in ("moac", "hf"):
        subject = subject_of(tiny_package)
        system = open_system(name, subject)
        running = Running(system, subject, load)
        running.prefill()
        running.decode(4)
        chosen.append(torch.as_tensor(system._next).flatten().tolist())  # type: ignore[attr-defined]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_growing_cache_is_the_model_s(
    family: str, tiny_package: Compiled, tiny_checkpoint: Callable[..., Path]
) -> None:
    # releases of transformers differ in the argument's name
    system = GrowingCache(subject_of(tiny_package, source=str(tiny_checkpoint(family))))
    system.open(1, 16)
    tokens = [[5, 6, 7, 8]]
    system.prefill(tokens)
    for _ in range(4):
        tokens[0] += system._next[0].tolist()
        system.step()
        assert system._next.item() == system._model(torch.tensor(tokens)).logits[0, -1].argmax()
    assert system._cache.get_seq_length() == 8


@pytest.mark.filterwarnings("ignore")  # torch's own, on import, and that it runs uncompiled
def test_flex_keeps_the_tokens_that_it_read(
    tiny_package: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    from moac.bench import flex

    monkeypatch.setattr(flex, "_compiled", flex_attention)
    load = Load(batch=2, context=24, capacity=32, seed=0)  # everything is dense this short
    chosen = []
    for make in (GrowingCache, flex.Flex):
        system = make(subject_of(tiny_package))
        running = Running(system, subject_of(tiny_package), load)
        running.prefill()
        running.decode(4)
        chosen.append(torch.as_tensor(system._next).flatten().tolist())
    assert chosen[0] == chosen[1]


@needs_compiler
def test_a_shape_runs_on_native_kernels(tiny_shape: ModelSpec, tiny_package: Compiled) -> None:
    if not runnable_sets(["cpu"]):
        pytest.skip("this processor has none of the instruction sets")
    plan = random_plan(tiny_shape, density=0.5, capacity=CAPACITY, seed=0)
    subject = subject_of(tiny_package, spec=tiny_shape, plan=plan, package=None, source=None)
    subject = replace(subject, shape="tiny", backend="cpu", dtype="bfloat16")
    load = Load(batch=2, context=CONTEXT, capacity=CAPACITY, seed=0)
    running = Running(open_system("moac", subject), subject, load)
    assert running.prefill() > 0
    assert len(running.decode(TOKENS)) == TOKENS
    held = plan.held_tokens(CAPACITY) * tiny_shape.kv_token_bytes(2)
    assert running.usage().kv_bytes == 2 * held


def test_our_best_backend_is_measured_unless_asked(tiny_package: Compiled) -> None:
    request = BenchRequest(package=tiny_package.package)
    assert with_backend(request).backend == "torch"
    assert with_backend(replace(request, backend="onnx")).backend == "onnx"
    assert with_backend(replace(request, device="cuda")).backend == "torch"  # it has no kernels
    assert with_backend(BenchRequest(shape="vicuna-7b")).backend == "torch"
    assert with_backend(BenchRequest(shape="vicuna-7b", device="cuda")).backend == "cuda"


def test_flex_masks_are_the_plans() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on import
        from torch.nn.attention.flex_attention import flex_attention

        from moac.bench.flex import LayerMask

    heads = [HeadSpan(300, 16), HeadSpan(48, 16), HeadSpan(200, 0, 200), HeadSpan(608, 0)]
    heads = [replace(head, window=500) for head in heads]
    keys, share = 608, 2
    k, v = torch.randn(2, 1, len(heads), keys, 16).unbind()
    for first, count in ((0, 300), (383, 1), (384, 1), (600, 1)):
        q = torch.randn(1, share * len(heads), count, 16)
        mask = LayerMask(heads, share, torch.tensor(first)).blocks(first, count, keys)
        row, column = torch.arange(first, first + count)[:, None], torch.arange(keys)
        seen = torch.stack([visible(row, column, heads[h // share]) for h in range(8)])
        blocks = mask.to_dense()[0].bool().repeat_interleave(128, 1).repeat_interleave(128, 2)
        assert not (seen & ~blocks[:, :count, :keys]).any()  # skipped is only what is unseen
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it runs uncompiled
            found = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        expected = scaled_dot_product_attention(q, k, v, attn_mask=seen[None], enable_gqa=True)
        torch.testing.assert_close(found, expected)


def test_flex_caps_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on import, and that it runs uncompiled
        from torch.nn.attention.flex_attention import flex_attention

        from moac.bench import flex

        monkeypatch.setattr(flex, "_compiled", flex_attention)
        q, k, v = torch.randn(3, 1, 2, 256, 16).unbind()
        heads, module = [HeadSpan(256, 0)] * 2, torch.nn.Module()
        module.layer_idx = 0
        blocks = [flex.LayerMask(heads, 1, torch.tensor(0)).blocks(0, 256, 256)]
        found, _ = flex._attend(module, q, k, v, None, 0.3, moac_blocks=blocks, softcap=0.7)
    seen = torch.ones(256, 256, dtype=torch.bool).tril()
    expected = masked_attention(q, k, v, seen, 0.3, 0.7)
    torch.testing.assert_close(found.transpose(1, 2), expected)


def test_a_repeat_starts_from_an_empty_cache(tiny_package: Compiled) -> None:
    subject = subject_of(tiny_package)
    load = Load(batch=1, context=28, capacity=32, seed=0)  # one more would be sparse
    for name in ("moac", "hf"):
        running = Running(open_system(name, subject), subject, load)
        for _ in range(2):
            running.prefill()
            running.decode(4)
        assert running.usage().kv_bytes == 32 * 2 * 2 * subject.spec.kv_token_bytes(4)


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75, 1.0])
def test_random_plans_are_as_dense_as_asked(density: float) -> None:
    spec = shape_spec("llama3-8b")
    plan = random_plan(spec, density=density, capacity=8192, seed=1)
    assert density - 0.05 <= plan.density(8192) <= density
    assert plan == random_plan(spec, density=density, capacity=8192, seed=1)
    assert max(len(set(layer)) for layer in plan.rules) <= 2
    if density < 1:
        assert len({rule for layer in plan.rules for rule in layer}) > 8
        assert plan != random_plan(spec, density=density, capacity=8192, seed=2)


def test_every_system_has_its_plan(tiny_package: Compiled) -> None:
    own = open_artifact(tiny_package.package).plan
    densities = {name: plan_of(name, tiny_package).density(CAPACITY) for name in SYSTEMS}
    assert plan_of("moac", tiny_package) == own
    assert all(densities[name] == 1 for name in ("hf", "hf-static", "dense", "llamacpp"))
    assert abs(densities["uniform"] - densities["moac"]) <= own.block / 2 / CAPACITY + 1e-9
    assert densities["moac"] < 1
    assert len({rule for layer in plan_of("uniform", tiny_package).rules for rule in layer}) == 1


def test_uniform_holds_as_many_bytes_as_a_plan_with_widths(tiny_package: Compiled) -> None:
    artifact = open_artifact(tiny_package.package)
    rules = [[replace(rule, bits=8) for rule in layer] for layer in artifact.plan.rules]
    plan = replace(artifact.plan, rules=tuple(map(tuple, rules)))
    found = system_plan("uniform", plan, CAPACITY, artifact.kv)
    assert {rule.bits for layer in found.rules for rule in layer} == {8}
    heads = artifact.spec.num_layers * artifact.spec.num_kv_heads
    apart = found.held_bytes(CAPACITY, artifact.kv) - plan.held_bytes(CAPACITY, artifact.kv)
    assert abs(apart) <= heads * plan.block * artifact.kv.token_bytes(8)
    assert system_plan("flex", plan, CAPACITY, artifact.kv) == plan.unrounded()
    assert system_plan("moac", plan, CAPACITY, artifact.kv) == plan


def test_the_floor_counts_what_a_step_reads(tiny_package: Compiled) -> None:
    spec = replace(open_artifact(tiny_package.package).spec, tied_embeddings=False)
    table = spec.vocab_size * spec.hidden_size
    untied, tied = (
        weight_bytes_read(replace(spec, tied_embeddings=tied), 2) for tied in (False, True)
    )
    assert untied == tied  # the head is read where the embedding is not
    assert untied > 2 * table
    plan = plan_of("dense", tiny_package)
    heads = spec.num_layers * spec.num_kv_heads
    read = kv_bytes_read(spec, plan, batch=3, capacity=CAPACITY, length=100, itemsize=2)
    assert read == 3 * 100 * heads * spec.kv_token_bytes(2)
    full = kv_bytes_read(
        spec,
        plan_of("moac", tiny_package),
        batch=1,
        capacity=CAPACITY,
        length=CAPACITY,
        itemsize=2,
    )
    held = plan_of("moac", tiny_package).held_tokens(CAPACITY)
    assert full == held * spec.kv_token_bytes(2)
    assert floor_ms(20e9, 10.0) == 2000


def test_percentiles_are_measured_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 95) == 3
    assert percentile([float(n) for n in range(1, 101)], 95) == 95
    assert percentile([7.0], 95) == 7


def test_bandwidth_and_peak_are_plausible() -> None:
    assert 0.1 < read_bandwidth_gbs("cpu", buffer_bytes=1 << 24) < 10_000
    before = peak_bytes("cpu")
    assert before is not None
    block = torch.ones(64 << 20, dtype=torch.uint8)
    after = peak_bytes("cpu")
    assert after is not None
    assert after >= before
    assert after >= block.nbytes


def test_a_failing_system_is_one_sentence(tiny_package: Compiled) -> None:
    subject = subject_of(tiny_package, source="/nowhere/model")
    load = Load(batch=1, context=8, capacity=12, seed=0)
    with (
        pytest.raises(MoacError, match=r"^hf could not run: .*/nowhere/model"),
        Worker("hf", subject, load),
    ):
        pass


def test_what_cannot_run_is_refused_by_name(
    tiny_package: Compiled, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    package, gguf = tiny_package.package, Path("nowhere.gguf")
    found = {
        "hf": BenchRequest(package=package, against=("hf",)),
        "llamacpp": BenchRequest(package=package, against=("llamacpp",), gguf=gguf),
    }
    assert "--source" in (availability.obstacle("hf", found["hf"]) or "")
    monkeypatch.setattr(availability, "find_spec", lambda name: object())
    assert "nowhere.gguf" in (availability.obstacle("llamacpp", found["llamacpp"]) or "")
    assert "--target onnx" in (availability.obstacle("onnx", found["hf"]) or "")
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    refused = availability.obstacle("llamacpp", found["llamacpp"])
    assert refused == "it needs llama-cpp-python; run: pip install llama-cpp-python"
    assert "pip install" in (availability.obstacle("hf", found["hf"]) or "")
    against = ("--against", "dense,llamacpp")
    assert moac_command("bench", package, "--context", 256, *against) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: llamacpp cannot run here: {refused}\n"
    assert moac_command("bench", package, "--context", 256, "--backend", "onnx") == 1
    assert "compile it with --target onnx" in capsys.readouterr().err
    on_cpu = ("bench", package, "--context", 256, "--backend", "cpu")
    assert moac_command(*on_cpu) == 1
    assert "compile it with --target cpu" in capsys.readouterr().err
    monkeypatch.setattr(runner, "obstacle", lambda spec, dtype: "they need another shape")
    assert moac_command(*on_cpu) == 1
    told = "no CPU kernel serves this model (they need another shape), so leave out --backend cpu"
    assert told in capsys.readouterr().err


GIB = 2**30


@pytest.mark.parametrize(
    ("free", "sequential", "sentence"),
    [
        (
            20 * GIB,
            False,
            "moac, hf together need at least 25.8 GiB for weights and caches, 20.0 free: "
            "give --sequential",
        ),
        (
            12 * GIB,
            True,
            "hf needs at least 13.0 GiB for weights and caches, 12.0 free: measure a smaller "
            "--batch, --context or --shape",
        ),
        (20 * GIB, True, None),
        (26 * GIB, False, None),
    ],
)
def test_what_does_not_fit_is_told_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, free: int, sequential: bool, sentence: str | None
) -> None:
    started: list[str] = []

    class Started(Exception):
        pass

    def start(name: str, subject: Subject, load: Load) -> None:
        started.append(name)
        raise Started

    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    monkeypatch.setattr(runner, "Worker", start)
    monkeypatch.setattr(runner, "read_bandwidth_gbs", lambda device: 1.0)
    request = BenchRequest(
        shape="vicuna-7b", against=("hf",), contexts=(892,), tokens=4, sequential=sequential
    )
    with pytest.raises(Started if sentence is None else MoacError) as raised:
        run_bench(request)
    assert started == (["moac"] if sentence is None else [])
    assert sentence is None or str(raised.value) == sentence


def test_mapped_weights_are_not_counted(tiny_package: Compiled) -> None:
    subject = subject_of(tiny_package)
    load = Load(batch=2, context=CONTEXT, capacity=CAPACITY, seed=0)
    held = 2 * subject.plan.held_tokens(CAPACITY) * subject.spec.kv_token_bytes(4)
    assert memory.least_bytes("moac", replace(subject, backend="cpu"), load) == held
    assert memory.least_bytes("llamacpp", subject, load) == held
    weights = weight_bytes_read(replace(subject.spec, tied_embeddings=True), 4)
    assert memory.least_bytes("hf", subject, load) >= held + weights
    assert memory.available_bytes("cpu") > 0


def test_memory_is_what_the_control_groups_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: 2**20)
    assert memory.available_bytes("cpu") == 2**20


def test_the_default_is_what_can_run_here(tiny_package: Compiled) -> None:
    request = BenchRequest(package=tiny_package.package)
    assert choose_systems(request) == ("moac", "dense", "uniform")
    assert "hf" in choose_systems(replace(request, source="somewhere"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give one of them"),
        (["PACKAGE", "--shape", "vicuna-7b"], "give one of them"),
        (["--shape", "vicuna-8b"], "there is no shape 'vicuna-8b'"),
        (["--shape", "vicuna-7b", "--source", "x"], "leave out --source"),
        (["--shape", "vicuna-7b", "--backend", "onnx"], "leave out --backend"),
        (["--shape", "vicuna-7b", "--backend", "cuda"], "give --device cuda as well"),
        (
            ["--shape", "vicuna-7b", "--backend", "cpu", "--dtype", "float16"],
            "bfloat16 or float32",
        ),
        (["PACKAGE", "--backend", "cpu", "--device", "cuda"], "runs on the CPU"),
        (["PACKAGE", "--against", "vllm"], "there is no system 'vllm'"),
        (["PACKAGE", "--batch", "1,0"], "--batch must be 1 or more, got 0"),
        (["PACKAGE", "--batch", "one"], "'one' is not a list of numbers"),
        (["PACKAGE", "--tokens", "0"], "--tokens must be 1 or more"),
        (["PACKAGE", "--density", "2"], "--density must be above 0"),
        (["PACKAGE", "--dtype", "int3"], "there is no dtype 'int3'"),
        (["PACKAGE", "--context", "99999"], "measure a shorter context"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    tiny_package: Compiled, capsys: Capture, words: list[str], sentence: str
) -> None:
    words = [str(tiny_package.package) if word == "PACKAGE" else word for word in words]
    assert moac_command("bench", *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_a_source_of_another_model_is_refused(
    tiny_package: Compiled, tiny_checkpoint: object, capsys: Capture
) -> None:
    other = tiny_checkpoint("qwen3")  # type: ignore[operator]
    with pytest.raises(UsageError, match="another model"):
        run_bench(BenchRequest(package=tiny_package.package, source=str(other)))
