"""The onnx target: the graph against the oracle, its caches, its package, a host without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from batches import WRONG_FEEDS, Batch
from families import checkpoint_tensors, tiny_model
from oracle import oracle_logits
from tiny import Compiled, moac_command, options, request
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import moac_runtime
from moac import compile_model
from moac.checkpoint.families import model_spec
from moac.export import target
from moac.export.write import write_onnx
from moac.packaging.fuse import head_order, pack_weights
from moac.packaging.writer import write_weights
from moac.pipeline.verify import verify
from moac.show.inspection import inspect_package
from moac_runtime.backends.feeding import by_feed
from moac_runtime.backends.layout import rope_frequencies
from moac_runtime.backends.onnx.layout import ONNX_LAYOUT, ONNX_MODEL, OnnxLayout, cache_layouts
from moac_runtime.backends.onnx.session import CHUNK, OnnxGraph, OnnxSession, open_onnx
from moac_runtime.backends.open import choose_backend
from moac_runtime.backends.session import Feed
from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule

VOCAB = 320
ATOL = 2e-4


def plan_of(*layers: tuple[Rule, ...], windows: tuple[int | None, ...] = (None, None)) -> Plan:
    return Plan(layers, sink=4, block=4, min_span=8, windows=windows)


MIXED = plan_of((Rule(16, 0.0), Rule(0, 0.5)), (Rule(24, 0.0), DENSE))
EQUAL = plan_of((Rule(8, 0.125), Rule(8, 0.125)), (Rule(8, 0.125), Rule(8, 0.125)))
WINDOWED = plan_of((Rule(16, 0.0), DENSE), (Rule(0, 0.5), DENSE), windows=(24, 40))


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def export(
    model: PreTrainedModel, plan: Plan, folder: Path, *, dtype: str = "float32", **changes: Any
) -> OnnxGraph:
    """The graph of `model` under `plan`, written and opened."""
    spec, order, weights = model_spec(model.config), head_order(plan), checkpoint_tensors(model)
    stored = changes.pop("stored", torch.float32)
    write_weights(folder, pack_weights(weights.__getitem__, spec, order), dtype=stored)
    choices = {"dtype": dtype, "capacity": 512, "weights": "shared", **changes}
    write_onnx(folder, spec=spec, plan=plan, head_order=order, **choices)
    layout = OnnxLayout.from_json(json.loads((folder / ONNX_LAYOUT).read_text()))
    return OnnxGraph(folder / ONNX_MODEL, layout, spec.ropes, threads=1)


def open_session(graph: OnnxGraph, *, capacity: int, batch: int = 1, chunk: int = CHUNK) -> Batch:
    """Rows of a session on a graph, under the plan it was made for."""
    order: Any = ()  # of heads: only another plan asks for it
    return Batch(OnnxSession(graph, None, order, chunk=chunk), batch=batch, capacity=capacity)


def close(found: Any, wanted: torch.Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(torch.as_tensor(found), wanted, atol=atol, rtol=0)


# every family, every RoPE kind, grouped queries of 1, 2 and 4, biases, query and key norms
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope": "llama3", "attention_bias": True, "mlp_bias": True},
    "mistral": {"rope": "yarn", "num_attention_heads": 8},
    "qwen2": {"rope": "dynamic", "num_attention_heads": 2},
    "qwen3": {"rope": "linear"},
    "smollm3": {},
    "granite": {},
    "gemma2": {},
    "gemma3_text": {},
    "olmo2": {},
    "phi3": {"rope": "longrope"},
    "cohere2": {},
    "stablelm": {"use_parallel_residual": True},
}


@pytest.mark.parametrize("family", MODELS)
def test_prefill_and_decode_are_the_oracles(family: str, tmp_path: Path) -> None:
    model, tokens = tiny_model(family, **MODELS[family]), text(96)
    wanted = oracle_logits(model, tokens, MIXED, 96)
    graph = export(model, MIXED, tmp_path)
    for chunk in (256, 7):
        session = open_session(graph, capacity=96, chunk=chunk)
        close(session.each([tokens[:80]])[0], wanted[:80])
        for place in range(80, 96):
            close(session.decode([tokens[place]])[0], wanted[place])
    dense = oracle_logits(model, tokens, plan_of((DENSE, DENSE), (DENSE, DENSE)), 96)
    assert (wanted - dense)[40:].abs().amax(-1).min() > 10 * ATOL


@pytest.mark.parametrize("plan", [EQUAL, WINDOWED], ids=["one kind", "windows"])
@pytest.mark.parametrize("capacity", [8, 20, 40, 64])
def test_every_capacity_runs_on_one_graph(plan: Plan, capacity: int, tmp_path: Path) -> None:
    family = "llama" if plan is EQUAL else "mistral"
    model, tokens = tiny_model(family), text(capacity)
    graph = export(model, plan, tmp_path)
    session = open_session(graph, capacity=capacity, chunk=16)
    wanted = oracle_logits(model, tokens, plan, capacity)
    close(session.each([tokens])[0], wanted)


def test_ragged_rows_are_as_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    rows, fed = [text(64, seed) for seed in range(4)], (5, 40, 40, 17)
    wanted = [oracle_logits(model, row, MIXED, 64) for row in rows]
    session = open_session(export(model, MIXED, tmp_path), batch=4, capacity=64)
    held = session.kv_bytes()
    last = session.last([row[:count] for row, count in zip(rows, fed, strict=True)])
    ends = [row[count - 1] for row, count in zip(wanted, fed, strict=True)]
    close(torch.cat(last), torch.stack(ends))
    for step in range(20):
        found = session.decode([row[count + step] for row, count in zip(rows, fed, strict=True)])
        close(found, torch.stack([w[c + step] for w, c in zip(wanted, fed, strict=True)]))
    session.keep([3, 1])
    assert session.lengths == [37, 60]
    assert session.kv_bytes() == held // 2
    found = session.decode([rows[3][37], rows[1][60]])
    close(found, torch.stack([wanted[3][37], wanted[1][60]]))
    none, chosen = session.feed([[], rows[1][61:64]], [[], [0, 2]])
    assert none.shape == (0, VOCAB)
    close(chosen, wanted[1][[61, 63]])
    close(session.each([rows[3][38:45], []])[0], wanted[3][38:45])


def test_padded_rows_of_one_step_are_as_alone(tmp_path: Path) -> None:
    """A client may pad: rows of one step with counts of their own, and a row that adds none."""
    model, capacity = tiny_model("llama"), 64
    graph = export(model, MIXED, tmp_path)
    session: Any = open_session(graph, batch=3, capacity=capacity).session
    session._begin_once()
    rows = [text(64, seed) for seed in range(3)]
    wanted = [oracle_logits(model, row, MIXED, capacity) for row in rows]
    caches = {f"past.{name}": array for name, array in session._caches.items()}
    lengths = np.zeros(3, dtype=np.int64)
    for counts in ([20, 3, 9], [1, 30, 0], [12, 1, 40], [5, 7, 2]):
        width = max(counts)
        tokens = np.full((3, width), 7, dtype=np.int64)
        for row, count in enumerate(counts):
            tokens[row, :count] = rows[row][lengths[row] : lengths[row] + count]
        last = [row * width + max(count - 1, 0) for row, count in enumerate(counts)]
        feeds = {
            **{"tokens": tokens, "past_lengths": lengths, "counts": np.array(counts)},
            **{"wanted": np.array(last), **session._frequencies},
            **{"sinks": np.array([head.sink for head in session._spans]), **caches},
        }
        names = [output.name for output in graph._session.get_outputs()]
        found = dict(zip(names, graph._session.run(None, feeds), strict=True))
        caches = {f"past.{n[8:]}": a for n, a in found.items() if n != "logits"}
        lengths = lengths + np.array(counts)
        for row, count in enumerate(counts):
            if count:
                close(found["logits"][row], wanted[row][lengths[row] - 1])


@pytest.mark.parametrize("capacity", [1, 8, 40, 64, 200])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cache_bytes_of_the_inputs_are_the_plans(
    capacity: int, dtype: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    graph = export(model, MIXED, tmp_path, dtype=dtype)
    sizes = {f"span_{i}": head.size for i, head in enumerate(graph.layout.resolve(capacity))}
    width = {"float32": 4, "float16": 2}[dtype]
    inputs = onnx.load(tmp_path / ONNX_MODEL, load_external_data=False).graph.input
    shapes = [i.type.tensor_type.shape.dim for i in inputs if i.name.startswith("past.")]
    held = sum(
        width * int(np.prod([sizes.get(d.dim_param, d.dim_value) for d in shape[1:]]))
        for shape in shapes
    )
    planned = MIXED.held_tokens(capacity) * model_spec(model.config).kv_token_bytes(width)
    assert held == planned
    session = open_session(graph, batch=3, capacity=capacity)
    assert session.kv_bytes() == 3 * planned
    session.last([[1], [1], [1]])
    assert session.kv_bytes() == 3 * planned == 3 * session.session.kv_bytes(session.rows[0])


def test_steps_write_in_place(tmp_path: Path) -> None:
    batch = open_session(export(tiny_model("llama"), MIXED, tmp_path), capacity=64)
    session: Any = batch.session
    batch.last([text(49)])
    before = {name: array.ctypes.data for name, array in session._caches.items()}
    batch.last([text(2)])
    kept = {name: array.copy() for name, array in session._caches.items()}
    batch.decode([1])
    after = session._caches
    assert {name: array.ctypes.data for name, array in after.items()} == before
    for name, array in after.items():
        assert (array != kept[name]).any(axis=(0, 1, 3)).sum() == 1  # one slot of each cache


def test_weights_are_the_packages_own(tmp_path: Path) -> None:
    export(tiny_model("qwen2"), MIXED, tmp_path, stored=torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == [ONNX_MODEL, ONNX_LAYOUT, "weights"]
    assert (tmp_path / ONNX_MODEL).stat().st_size < 100_000
    model = onnx.load(tmp_path / ONNX_MODEL, load_external_data=False)
    large = [t for t in model.graph.initializer if np.prod(t.dims) > 500]
    assert len(large) == 2 * 4 + 1
    assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in large)


@pytest.mark.parametrize(
    ("choices", "rounded"),
    [
        ({"dtype": "float16"}, lambda model: model.half()),
        ({"weights": "int8"}, lambda model: target.round_to_int8(model) or model),
    ],
    ids=["float16", "int8"],
)
def test_rounding_errs_as_the_model_so_rounded(
    choices: dict[str, Any], rounded: Callable[[Any], Any], tmp_path: Path
) -> None:
    exact, tokens = tiny_model("llama"), text(64)
    wanted = oracle_logits(exact, tokens, MIXED, 64)
    owed = (oracle_logits(rounded(tiny_model("llama")), tokens, MIXED, 64) - wanted).norm()
    session = open_session(export(exact, MIXED, tmp_path, **choices), capacity=64)
    error = (session.each([tokens])[0] - wanted).norm()
    assert 0 < error < 2 * owed


def test_rows_fed_in_any_order_are_as_alone(tmp_path: Path) -> None:
    """Groups of adjacent rows share a step; logits come in the order of the feeds."""
    model = tiny_model("llama")
    texts = [text(30, seed) for seed in range(4)]
    wanted = [oracle_logits(model, row, MIXED, 64) for row in texts]
    batch = open_session(export(model, MIXED, tmp_path), batch=4, capacity=64, chunk=4)
    a, b, c, d = batch.rows
    feeds = [
        Feed(d, texts[3][:9], [3, 4, 8]),
        Feed(a, texts[0][:6], ()),
        Feed(b, texts[1][:6], range(6)),
        Feed(c, texts[2][:1]),
    ]
    found = by_feed(batch.session.step(feeds), feeds)
    close(found[0], wanted[3][[3, 4, 8]])
    close(found[2], wanted[1][:6])
    close(found[3], wanted[2][:1])
    feeds = [Feed(c, texts[2][1:2]), Feed(a, texts[0][6:7]), Feed(b, texts[1][6:7])]
    close(batch.session.step(feeds), torch.stack([wanted[2][1], wanted[0][6], wanted[1][6]]))


def test_a_restored_row_continues_and_a_late_one_is_refused(tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), text(64)
    wanted = oracle_logits(model, tokens, MIXED, 64)
    graph = export(model, MIXED, tmp_path)
    begun = open_session(graph, capacity=64)
    begun.last([tokens[:50]])  # rings have wrapped
    taken = begun.session.snapshot(begun.rows[0])
    assert taken.bytes == begun.kv_bytes()
    late = "the batch has begun, and this backend takes no row after the first step; admit all"
    for ask in (lambda: begun.session.admit(64), lambda: begun.session.restore(taken)):
        with pytest.raises(UsageError, match=late):
            ask()
    other = open_session(graph, capacity=64)
    other.rows.append(other.session.restore(taken))
    fresh, restored = other.each([tokens[:14], tokens[50:]])
    close(fresh, wanted[:14])
    close(restored, wanted[50:])
    for row in other.rows:
        other.session.release(row)
    assert other.kv_bytes() == 0
    # with its last row the batch is over, and another may begin
    close(Batch(other.session, batch=1, capacity=64).each([tokens])[0], wanted)


def test_another_plan_runs_where_heads_of_a_cache_agree(tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), text(64)
    graph, order = export(model, MIXED, tmp_path), head_order(MIXED)
    dense = plan_of((DENSE, DENSE), (DENSE, DENSE))
    for plan in (dense, MIXED):
        session = Batch(OnnxSession(graph, plan, order), batch=1, capacity=64)
        close(session.each([tokens])[0], oracle_logits(model, tokens, plan, 64))
    (tmp_path / "equal").mkdir()
    graph, order = export(model, EQUAL, tmp_path / "equal"), head_order(EQUAL)
    with pytest.raises(UsageError, match="ONNX graph does not serve this plan: heads that share"):
        OnnxSession(graph, MIXED, order).admit(64)


@pytest.mark.parametrize("capacity", [40, 64, 65, 300])
def test_dynamic_frequencies_are_the_librarys(capacity: int) -> None:
    config = tiny_model("llama", rope="dynamic").config
    spec = model_spec(config)
    wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=capacity)
    close(
        torch.tensor(rope_frequencies(spec.ropes[0], spec.head_dim, capacity)), wanted, atol=1e-7
    )


def test_layout_survives_json() -> None:
    spans, caches = cache_layouts(WINDOWED, ((1, 0), (0, 1)))
    sizes = {"sink": 4, "block": 4, "min_span": 8, "capacity": 64, "head_dim": 16}
    layout = OnnxLayout("float32", "shared", **sizes, vocab_size=VOCAB, spans=spans, caches=caches)
    assert OnnxLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert [cache.span for cache in caches] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("ask", "error", "sentence"),
    [
        *((ask, UsageError, sentence) for ask, sentence in WRONG_FEEDS),
        (
            lambda s: s.step([Feed(0, [1] * 17)]),
            MoacError,
            "row 0 holds 0 of 16 tokens and cannot take 17 more; admit it with a larger capacity",
        ),
        (lambda s: s.grow(0, 32), UsageError, "rows of an ONNX graph cannot grow; admit them"),
        (lambda s: s.release(2), UsageError, "the session has no row 2"),
        (
            lambda s: s.admit(17),
            UsageError,
            "a row of 17 tokens cannot join a batch of rows of 16; this backend runs all of them",
        ),
    ],
)
def test_wrong_requests_are_one_sentence(
    ask: Any, error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    batch = open_session(export(tiny_model("llama"), MIXED, tmp_path), batch=2, capacity=16)
    with pytest.raises(error, match=sentence):
        ask(batch.session)
    assert batch.lengths == [0, 0]


# ---- the package


@pytest.fixture(scope="module")
def onnx_package(tiny_package: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package built for onnx alone."""
    out = tmp_path_factory.mktemp("onnx") / "out"
    asked = request(targets=("onnx",))
    compile_model(tiny_package.checkpoint, out, request=asked, work_dir=tiny_package.work_dir)
    return out


def test_a_package_of_onnx_alone_runs_on_it(tiny_package: Compiled, onnx_package: Path) -> None:
    model = moac_runtime.load(onnx_package)
    assert (model.backend, model.dtype) == ("onnx", "float32")
    asked: Any = {"max_tokens": 12, "temperature": 0, "capacity": 600}
    prompts = ["Remember the key. " * 20, "hello"]
    wanted = moac_runtime.load(tiny_package.package, dtype="float32").generate(prompts, **asked)
    found = model.generate(prompts, **asked)
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
    assert [a.stats.kv_held_bytes for a in found] == [a.stats.kv_held_bytes for a in wanted]
    sampled: Any = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.1}
    assert len(model.generate("hello", max_tokens=8, **sampled)[0].token_ids) > 0
    with pytest.raises(MoacError, match="the backend torch cannot run here"):
        moac_runtime.load(onnx_package, backend="torch")
    with pytest.raises(UsageError, match="computes in float32, not in float16"):
        moac_runtime.load(onnx_package, dtype="float16")


def test_inspect_lists_the_target_and_verify_checks_it(onnx_package: Path) -> None:
    assert inspect_package(onnx_package)["targets"] == ["onnx"]
    checks = {check.name: check for check in verify(onnx_package)}
    assert all(check.ok for check in checks.values())
    kinds = {name.split(": ")[1] for name in checks if "onnx float32" in name}
    assert kinds == {"prefill", "decode", "sparse differs from dense by"}
    assert not any("tokens float32" in name for name in checks)


def test_verify_finds_a_graph_of_another_plan(onnx_package: Path, tmp_path: Path) -> None:
    from moac.packaging.writer import write_manifest

    out = tmp_path / "out"
    shutil.copytree(onnx_package, out)
    layout = json.loads((out / ONNX_LAYOUT).read_text())
    layout["spans"] = [{**span, "alpha": 64, "beta": 0.0} for span in layout["spans"]]
    (out / ONNX_LAYOUT).write_text(json.dumps(layout))
    a = open_artifact(onnx_package)
    records: Any = {"provenance": a.provenance, "verification": a.verification}
    shape: Any = {"capacity": a.capacity, "head_order": a.head_order, "targets": a.targets}
    write_manifest(out, model=a.spec, dtype=a.dtype, **shape, **records)
    assert not all(check.ok for check in verify(out))


def test_a_damaged_layout_is_one_sentence(onnx_package: Path, tmp_path: Path) -> None:
    artifact = open_artifact(onnx_package)
    shutil.copytree(onnx_package, tmp_path / "out")
    (tmp_path / "out" / ONNX_LAYOUT).write_text("{}")
    from dataclasses import replace

    with pytest.raises(ArtifactError, match=r"onnx\.json describes no graph"):
        open_onnx(replace(artifact, root=tmp_path / "out"))


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moac_runtime.backends.open.find_spec", lambda name: None)
    monkeypatch.setattr("moac.export.target.find_spec", lambda name: None)
    with pytest.raises(MoacError, match=r"needs onnxruntime, .*pip install 'moac\[onnx\]'"):
        choose_backend("onnx", ["torch", "onnx"])
    with pytest.raises(UsageError, match=r"target onnx needs onnx, .*pip install 'moac\[onnx\]'"):
        target.require_onnx(model_spec(tiny_model("llama").config))


def test_a_host_without_torch_takes_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "moac_runtime.backends.open.find_spec", lambda name: None if name == "torch" else name
    )
    assert choose_backend(None, ["torch", "onnx"]) == "onnx"
    with pytest.raises(MoacError, match="the backend torch needs torch"):
        choose_backend("torch", ["torch", "onnx"])


WITHOUT = """
import sys, runpy
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "safetensors", "transformers", "onnx", "moac"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
package = sys.argv.pop(1)
runpy.run_path(package, run_name="__main__")
"""


def test_a_package_runs_without_torch_and_safetensors(onnx_package: Path, tmp_path: Path) -> None:
    asked = ["--prompt", "hello", "--max-tokens", "5", "--backend", "onnx", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(onnx_package), *asked],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (wanted,) = moac_runtime.load(onnx_package).generate("hello", max_tokens=5, temperature=0)
    assert json.loads(done.stdout)["token_ids"] == list(wanted.token_ids)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--onnx-weights", "int8"], "--onnx-weights is for the onnx target"),
        (["--target", "onnx", "--onnx-weights", "int4"], "--onnx-weights is 'int4', expected"),
        (["--target", "onnx", "--onnx-dtype", "bfloat16"], "--onnx-dtype is 'bfloat16', exp"),
    ],
)
def test_wrong_options_are_one_sentence(
    tiny_package: Compiled,
    words: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["compile", tiny_package.checkpoint, "-o", tmp_path / "out", *options(), *words]
    assert moac_command(*command) == 2
    assert sentence in capsys.readouterr().err


def test_int8_compiles_and_verifies(tiny_package: Compiled, tmp_path: Path) -> None:
    asked = request(targets=("torch", "onnx"), onnx_weights="int8")
    out, work = tmp_path / "out", tiny_package.work_dir
    result = compile_model(tiny_package.checkpoint, out, request=asked, work_dir=work)
    names = [check.name for check in result.checks if "onnx int8" in check.name]
    assert len(names) == 4
    assert (
        moac_runtime.load(out, backend="onnx")
        .generate("hi", max_tokens=2, temperature=0)[0]
        .token_ids
    )
