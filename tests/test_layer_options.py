"""Options of layers, against the library's own attention in models that have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import Batch
from cpu_kernels import library as kernels_of
from cpu_kernels import needs_compiler, open_cpu_session
from families import VOCAB, tiny_model
from oracle import open_session
from test_onnx import export
from test_onnx import open_session as open_graph
from torch import Tensor
from transformers import PreTrainedModel

from moac.checkpoint.families import FAMILIES, model_spec
from moac.export.write import write_onnx
from moac.packaging.fuse import head_order, pack_weights, rotary_order
from moac.packaging.writer import write_weights
from moac.profiling.hooks import INFLUENCE, REFERENCE, attention
from moac_kernels.cpu_build import host_sets
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.session import CpuSession
from moac_runtime.backends.onnx.layout import ONNX_LAYOUT, ONNX_MODEL, OnnxLayout
from moac_runtime.backends.onnx.session import OnnxGraph
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.errors import MoacError
from moac_runtime.package.plan import Plan, dense_plan
from moac_runtime.package.spec import ModelSpec, NormSpec

LENGTH, ATOL = 90, 2e-4
# Families with options beside those of Llama, Mistral and Qwen; the first have one rotary table.
OF_ONE_ROPE = ("smollm3", "granite", "gemma2", "olmo2", "phi3", "cohere2", "stablelm")
OPTIONED = (*OF_ONE_ROPE, "gemma3_text")


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model of a family, run by the library's own attention."""
    model = tiny_model(family, **changes)
    model.set_attn_implementation("eager")
    return model


def library(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float()


def text() -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB, (LENGTH,), generator=generator).tolist()


def whole(spec: ModelSpec) -> Plan:
    """Nothing dropped but by the model's own windows."""
    return dense_plan(
        spec.num_layers, spec.num_kv_heads, sink=0, block=1, min_span=1, windows=spec.windows
    )


def read(session: Batch, tokens: list[int]) -> Tensor:
    """Logits of `tokens`: two thirds by prefill in two steps, the rest one by one."""
    first, second = LENGTH // 2, 2 * LENGTH // 3
    turns = (tokens[:first], tokens[first:second])
    parts = [session.each([turn])[0] for turn in turns]
    return torch.cat([*parts, *(session.decode([token]) for token in tokens[second:])])


@pytest.mark.parametrize("family", OPTIONED)
def test_torch_equals_the_library(family: str) -> None:
    model, tokens = tiny(family), text()
    plan, wanted = whole(model_spec(model.config)), library(model, tokens)
    for chunk in (512, 7):
        session = open_session(model, plan, capacity=LENGTH, chunk=chunk)
        torch.testing.assert_close(read(session, tokens), wanted, rtol=0, atol=ATOL)


@needs_compiler
@pytest.mark.parametrize("kernels", host_sets())
@pytest.mark.parametrize("family", OPTIONED)
def test_native_kernels_equal_the_library(family: str, kernels: str) -> None:
    model, tokens = tiny(family), text()
    plan, wanted = whole(model_spec(model.config)), library(model, tokens)
    for threads, chunk in ((1, 512), (3, 7)):
        session = open_cpu_session(
            model, plan, instruction_set=kernels, capacity=LENGTH, chunk=chunk, threads=threads
        )
        torch.testing.assert_close(read(session, tokens), wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", OF_ONE_ROPE)
def test_the_onnx_graph_equals_the_library(family: str, tmp_path: Path) -> None:
    model, tokens = tiny(family), text()
    plan, wanted = whole(model_spec(model.config)), library(model, tokens)
    session = open_graph(export(model, plan, tmp_path), capacity=LENGTH, chunk=16)
    torch.testing.assert_close(read(session, tokens), wanted, rtol=0, atol=ATOL)


@needs_compiler
@pytest.mark.parametrize("original", [LENGTH, LENGTH - 1])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_longrope_takes_its_factors_by_the_capacity(
    family: str, original: int, tmp_path: Path
) -> None:
    """As the library takes them by the length, of whole heads and of a part of them."""
    context = {"original_max_position_embeddings": original}
    settings = tiny(family, rope="longrope").config.rope_parameters | context
    model, tokens = tiny(family, rope_parameters=settings, **context), text()
    spec, wanted = model_spec(model.config), library(model, tokens)
    assert spec.ropes[0].original_context == original
    assert spec.ropes[0].scaling > 1
    plan = whole(spec)
    graph = export(model, plan, tmp_path)
    for session in (
        open_session(model, plan, capacity=LENGTH),
        open_cpu_session(model, plan, instruction_set="avx2", capacity=LENGTH, chunk=40),
        open_graph(graph, capacity=LENGTH, chunk=16),
    ):
        torch.testing.assert_close(read(session, tokens), wanted, rtol=0, atol=ATOL)
    longer = read(open_session(model, plan, capacity=LENGTH + 1), tokens)
    assert ((longer - wanted).abs().max() > 100 * ATOL) == (original == LENGTH)


@needs_compiler
@pytest.mark.parametrize("kernels", host_sets())
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_any_even_part_of_a_head_may_rotate(share: float, kernels: str) -> None:
    model, tokens = tiny("phi3", partial_rotary_factor=share, hidden_size=80), text()
    model, tokens = tiny("phi3", partial_rotary_factor=share, head_dim=32), text()
    spec, wanted = model_spec(model.config), library(model, tokens)
    assert spec.ropes[0].rotated == 32 * share
    plan = whole(spec)
    session = open_session(model, plan, capacity=LENGTH)
    torch.testing.assert_close(read(session, tokens), wanted, rtol=0, atol=ATOL)
    session = open_cpu_session(model, plan, instruction_set=kernels, capacity=LENGTH, chunk=40)
    torch.testing.assert_close(read(session, tokens), wanted, rtol=0, atol=ATOL)


def narrowed(width: int) -> tuple[PreTrainedModel, Decoder, dict[str, Tensor]]:
    """A Llama whose second layer's MLP is worth `width`, and a decoder that holds just that."""
    model: Any = tiny_model("llama")
    model.set_attn_implementation("eager")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight[width:] = 0
    spec = model_spec(model.config)
    own = replace(spec.kinds[0], intermediate_size=width)
    spec = replace(spec, kinds=(*spec.kinds, own), layers=(0, 1))
    weights = dict(model.state_dict())
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.1.mlp.{name}.weight"] = getattr(mlp, name).weight[:width]
    weights["model.layers.1.mlp.down_proj.weight"] = mlp.down_proj.weight[:, :width]
    packed = pack_weights(weights.__getitem__, spec, head_order(whole(spec)))
    tensors = {name: tensor.contiguous() for name, tensor in packed}
    return model, Decoder(spec, tensors), tensors


def test_layers_of_different_widths_equal_the_library() -> None:
    model, decoder, _ = narrowed(48)
    plan, tokens = whole(decoder.spec), text()
    session = Batch(TorchSession(decoder, plan, head_order(plan)), batch=1, capacity=LENGTH)
    torch.testing.assert_close(read(session, tokens), library(model, tokens), rtol=0, atol=ATOL)


@needs_compiler
@pytest.mark.parametrize("kernels", host_sets())
def test_native_layers_of_different_widths_equal_the_library(kernels: str) -> None:
    session, model = native_session(*narrowed(48), kernels)
    tokens = text()
    torch.testing.assert_close(read(session, tokens), library(model, tokens), rtol=0, atol=ATOL)


def native_session(
    model: PreTrainedModel, decoder: Decoder, tensors: dict[str, Tensor], kernels: str
) -> tuple[Batch, PreTrainedModel]:
    """A session of native kernels over packed tensors, and the model they are of."""
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    engine = CpuEngine(
        kernels_of(kernels), decoder.spec, addresses, dtype="float32", threads=2, memory=tensors
    )
    plan = whole(decoder.spec)
    rows = CpuSession(engine, plan, head_order(plan), chunk=40)
    return Batch(rows, batch=1, capacity=LENGTH), model


def test_a_graph_of_layers_of_different_widths_equals_the_library(tmp_path: Path) -> None:
    model, decoder, tensors = narrowed(48)
    tokens = text()
    session = graph_session(decoder.spec, tensors, tmp_path)
    torch.testing.assert_close(read(session, tokens), library(model, tokens), rtol=0, atol=ATOL)


def graph_session(spec: ModelSpec, tensors: dict[str, Tensor], folder: Path) -> Batch:
    """A session of a graph over packed tensors."""
    plan = whole(spec)
    write_weights(folder, tensors.items(), dtype=torch.float32)
    choices: Any = {"dtype": "float32", "capacity": LENGTH, "weights": "shared"}
    write_onnx(folder, spec=spec, plan=plan, head_order=head_order(plan), **choices)
    layout = OnnxLayout.from_json(json.loads((folder / ONNX_LAYOUT).read_text()))
    return open_graph(
        OnnxGraph(folder / ONNX_MODEL, layout, spec.ropes, threads=1), capacity=LENGTH
    )


def _without_cap(model: Any) -> None:
    model.config.attn_logit_softcapping = None


def _without_last_cap(model: Any) -> None:
    model.config.final_logit_softcapping = None


def _of_head_dim(model: Any) -> None:
    model.config.query_pre_attn_scalar = 16


def _other_norms_after(model: Any) -> None:
    for layer in model.model.layers:
        layer.post_feedforward_layernorm.weight.mul_(1.5)


def _rotating(model: Any) -> None:
    model.config.no_rope_layers = [1, 1]


def _factor_of_one(name: str) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, 1.0)


def _whole_heads(model: Any) -> None:
    model.config.rope_parameters["partial_rotary_factor"] = 1.0


def _in_parallel(model: Any) -> None:
    model.config.use_parallel_residual = True
    for layer in model.model.layers:
        layer.post_attention_layernorm = None


def _other_window(model: Any) -> None:
    model.config.sliding_window = 30


def _same_rope(model: Any) -> None:
    settings = model.config.rope_parameters
    settings["sliding_attention"] = settings["full_attention"]


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", _without_cap),
        ("gemma2", _without_last_cap),
        ("gemma2", _of_head_dim),
        ("gemma2", _other_window),
        ("olmo2", _other_norms_after),
        ("phi3", _whole_heads),
        ("stablelm", _in_parallel),
        ("stablelm", _whole_heads),
        ("cohere2", _factor_of_one("logit_scale")),
        ("cohere2", _other_window),
        ("smollm3", _rotating),
        ("granite", _factor_of_one("embedding_multiplier")),
        ("granite", _factor_of_one("residual_multiplier")),
        ("granite", _factor_of_one("attention_multiplier")),
        ("granite", _factor_of_one("logits_scaling")),
        ("gemma3_text", _same_rope),
        ("gemma3_text", _without_last_cap),
        ("gemma3_text", _of_head_dim),
    ],
)
def test_each_option_shows(family: str, change: Callable[[Any], None]) -> None:
    """The comparisons above would fail without the option: it moves logits by far more."""
    model, tokens = tiny(family), text()
    before = read(open_session(model, whole(model_spec(model.config)), capacity=LENGTH), tokens)
    change(model)
    after = read(open_session(model, whole(model_spec(model.config)), capacity=LENGTH), tokens)
    assert (before - after).abs().max() > 100 * ATOL


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("cohere2", {"norm": NormSpec(1e-5)}),
        ("cohere2", {"rope": 0}),
        ("cohere2", {"rope": None}),
        ("stablelm", {"norm": NormSpec(1e-5, centred=True)}),
    ],
)
def test_each_option_of_layers_shows(family: str, change: dict[str, Any]) -> None:
    model, tokens = tiny(family), text()
    spec = model_spec(model.config)
    other = replace(spec, kinds=tuple(replace(kind, **change) for kind in spec.kinds))
    weights, order = model.state_dict().__getitem__, head_order(whole(spec))
    found = []
    for one in (spec, other):
        decoder = Decoder(one, dict(pack_weights(weights, one, order)))
        row = Batch(TorchSession(decoder, whole(one), order), batch=1, capacity=LENGTH)
        found.append(read(row, tokens))
    assert (found[0] - found[1]).abs().max() > 100 * ATOL


def test_pairs_beside_each_other_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny("cohere2"), text()
    plan, wanted = whole(model_spec(model.config)), library(model, tokens)
    monkeypatch.setitem(FAMILIES, "cohere2", replace(FAMILIES["cohere2"], pairs=False))
    found = read(open_session(model, plan, capacity=LENGTH), tokens)
    assert (found - wanted).abs().max() > 100 * ATOL


@pytest.mark.parametrize("rotated", [4, 12, 16])
@pytest.mark.parametrize("pairs", [False, True])
def test_numbers_that_rotate_together_stand_half_a_head_apart(rotated: int, pairs: bool) -> None:
    order = rotary_order(16, rotated, pairs=pairs)
    assert sorted(order) == list(range(16))
    apart = 1 if pairs else rotated // 2
    assert [order[i + 8] - order[i] for i in range(rotated // 2)] == [apart] * (rotated // 2)
    assert all(place >= rotated for i in range(rotated // 2, 8) for place in order[i::8])


@pytest.mark.parametrize("implementation", [INFLUENCE, REFERENCE])
def test_what_profiling_would_drop_is_refused(implementation: str) -> None:
    model: Any = tiny("llama")
    plan = whole(model_spec(model.config))
    data: dict[str, Any] = {"moac_spans": plan.spans(LENGTH), "moac_recorder": None}
    del data["moac_recorder" if implementation == REFERENCE else "moac_spans"]
    with (
        attention(model, implementation),
        pytest.raises(MoacError, match="takes head_mask, which is neither profiled nor checked"),
    ):
        model(torch.tensor([text()]), use_cache=False, head_mask=torch.ones(4), **data)
