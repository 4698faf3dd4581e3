"""Options of layers, against the library's own attention in models that have them.

Families that are not served yet stand here whole: that each is one file's worth shows, too.
"""

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
from families import BASE, VOCAB, randomise, tiny_model
from oracle import open_session
from test_onnx import export
from test_onnx import open_session as open_graph
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from moac.checkpoint.families import FAMILIES, Family, Names, gemma3, model_spec, reading
from moac.export.write import write_onnx
from moac.packaging.fuse import head_order, pack_weights
from moac.packaging.writer import write_weights
from moac.profiling.hooks import INFLUENCE, REFERENCE, attention
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.library import INSTRUCTION_SETS
from moac_runtime.backends.cpu.session import CpuSession
from moac_runtime.backends.onnx.layout import ONNX_LAYOUT, ONNX_MODEL, OnnxLayout
from moac_runtime.backends.onnx.session import OnnxGraph
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.errors import MoacError
from moac_runtime.package.plan import Plan, dense_plan
from moac_runtime.package.spec import ModelSpec, NormSpec

LENGTH, LAYERS, ATOL = 90, 2, 2e-4
_AFTER = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def _gemma2(config: Any) -> ModelSpec:
    norm = NormSpec(config.rms_norm_eps, plus_one=True)
    layers = [
        reading.layer(
            config,
            activation="hidden_activation",
            norm=norm,
            query_scale=config.query_pre_attn_scalar**-0.5,
            window=window,
            post_norm=True,
            logit_cap=config.attn_logit_softcapping,
        )
        for window in reading.layer_windows(config)
    ]
    return reading.decoder(
        config,
        layers,
        reading.rope(config, "Gemma2RotaryEmbedding"),
        norm=norm,
        embedding_scale=config.hidden_size**0.5,
        logit_cap=config.final_logit_softcapping,
    )


def _olmo2(config: Any) -> ModelSpec:
    one = reading.layer(config, pre_norm=False, post_norm=True, qk_norm="width")
    table = reading.rope(config, "Olmo2RotaryEmbedding")
    return reading.decoder(config, [one] * config.num_hidden_layers, table)


def _phi3(config: Any) -> ModelSpec:
    one = reading.layer(config)
    table = reading.rope(config, "Phi3RotaryEmbedding")
    return reading.decoder(config, [one] * config.num_hidden_layers, table)


GEMMA2 = Family(
    model_type="gemma2",
    spec=_gemma2,
    names=gemma3.FAMILY.names,
    activation="hidden_activation",
    options=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
)
OLMO2 = Family(model_type="olmo2", spec=_olmo2, names=Names(**_AFTER))
PHI3 = Family(
    model_type="phi3",
    spec=_phi3,
    names=Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
)
SERVED = ("smollm3", "granite", "gemma3_text")
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 5,
        "sliding_window": 40,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "olmo2": {},
    "phi3": {},
}


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model of a family, run by the library's own attention."""
    if family in SERVED:
        served = tiny_model(family, **changes)
        served.set_attn_implementation("eager")
        return served
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    values = {**BASE, **CONFIGS[family], "rope_parameters": rope, **changes}
    config = CONFIG_MAPPING[family](**values)
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = classes[type(config)](config)
        randomise(model)
    model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False)


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


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in (GEMMA2, OLMO2, PHI3):
        monkeypatch.setitem(FAMILIES, family.model_type, family)


@pytest.mark.parametrize("family", [*CONFIGS, *SERVED])
def test_torch_equals_the_library(family: str) -> None:
    model, tokens = tiny(family), text()
    plan, wanted = whole(model_spec(model.config)), library(model, tokens)
    for chunk in (512, 7):
        session = open_session(model, plan, capacity=LENGTH, chunk=chunk)
        torch.testing.assert_close(read(session, tokens), wanted, rtol=0, atol=ATOL)


@needs_compiler
@pytest.mark.parametrize("kernels", INSTRUCTION_SETS)
@pytest.mark.parametrize("family", [*CONFIGS, *SERVED])
def test_native_kernels_equal_the_library(family: str, kernels: str) -> None:
    model, tokens = tiny(family), text()
    plan, wanted = whole(model_spec(model.config)), library(model, tokens)
    for threads, chunk in ((1, 512), (3, 7)):
        session = open_cpu_session(
            model, plan, instruction_set=kernels, capacity=LENGTH, chunk=chunk, threads=threads
        )
        torch.testing.assert_close(read(session, tokens), wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_onnx_graph_equals_the_library(family: str, tmp_path: Path) -> None:
    model, tokens = tiny(family), text()
    plan, wanted = whole(model_spec(model.config)), library(model, tokens)
    session = open_graph(export(model, plan, tmp_path), capacity=LENGTH, chunk=16)
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
@pytest.mark.parametrize("kernels", INSTRUCTION_SETS)
def test_native_layers_of_different_widths_equal_the_library(kernels: str) -> None:
    model, decoder, tensors = narrowed(48)
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    engine = CpuEngine(
        kernels_of(kernels), decoder.spec, addresses, dtype="float32", threads=2, memory=tensors
    )
    plan, tokens = whole(decoder.spec), text()
    rows = CpuSession(engine, plan, head_order(plan), chunk=40)
    session = Batch(rows, batch=1, capacity=LENGTH)
    torch.testing.assert_close(read(session, tokens), library(model, tokens), rtol=0, atol=ATOL)


def test_a_graph_of_layers_of_different_widths_equals_the_library(tmp_path: Path) -> None:
    model, decoder, tensors = narrowed(48)
    spec, tokens = decoder.spec, text()
    plan = whole(spec)
    write_weights(tmp_path, tensors.items(), dtype=torch.float32)
    order = head_order(plan)
    choices: Any = {"dtype": "float32", "capacity": LENGTH, "weights": "shared"}
    write_onnx(tmp_path, spec=spec, plan=plan, head_order=order, **choices)
    layout = OnnxLayout.from_json(json.loads((tmp_path / ONNX_LAYOUT).read_text()))
    graph = OnnxGraph(tmp_path / ONNX_MODEL, layout, spec.ropes[0], threads=1)
    session = open_graph(graph, capacity=LENGTH)
    torch.testing.assert_close(read(session, tokens), library(model, tokens), rtol=0, atol=ATOL)


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


def _same_rope(model: Any) -> None:
    settings = model.config.rope_parameters
    settings["sliding_attention"] = settings["full_attention"]


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", _without_cap),
        ("gemma2", _without_last_cap),
        ("gemma2", _of_head_dim),
        ("olmo2", _other_norms_after),
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


@pytest.mark.parametrize("implementation", [INFLUENCE, REFERENCE])
def test_what_profiling_would_drop_is_refused(implementation: str) -> None:
    model: Any = tiny("gemma2")
    plan = whole(model_spec(model.config))
    data = {"moac_spans": plan.spans(LENGTH), "moac_recorder": None}
    del data["moac_recorder" if implementation == REFERENCE else "moac_spans"]
    with (
        attention(model, implementation),
        pytest.raises(MoacError, match="takes softcap, which is neither profiled nor checked"),
    ):
        model(torch.tensor([text()]), use_cache=False, **data)
