"""Mixtures of experts: the library's own numbers, whoever shares a step, and no byte too many."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import Batch
from cpu_kernels import library as kernels_of
from cpu_kernels import needs_compiler, open_cpu_session
from families import MIXTURES, checkpoint_tensors, tiny_model
from oracle import open_session, oracle_logits
from plans import text
from torch import Tensor

from moac.bench.floor import weight_bytes_read
from moac.checkpoint import open_checkpoint
from moac.checkpoint.families import model_spec
from moac.export.target import require_onnx
from moac.packaging.fuse import head_order, pack_weights
from moac.packaging.kernels import require_kernels
from moac.packaging.quantise import disturb_roundings
from moac.pipeline import compiler
from moac.request import CompileRequest
from moac_kernels.cpu_build import host_sets
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.session import CpuSession
from moac_runtime.errors import CheckpointError, UsageError
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule

LENGTH, ATOL = 96, 2e-4
RULES = ((Rule(0, 0.25), DENSE), (Rule(-8, 0.125), Rule(0, 0.5)))
# what each family has that the layers of another lack, and what it is without
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"mlp_only_layers": [1]}),
    ("qwen3_moe", {"mlp_only_layers": []}),
    ("qwen3_moe", {"num_experts_per_tok": 3}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("olmoe", {"norm_topk_prob": True}),
    ("olmoe", {"hidden_act": "gelu"}),
    ("gpt_oss", {"swiglu_limit": 0.5}),
    ("gpt_oss", {"swiglu_alpha": 1.0}),
    ("gpt_oss", {"num_local_experts": 5, "num_experts_per_tok": 5}),
]


@cache
def model(family: str) -> Any:
    return tiny_model(family)


def plan_of(made: Any) -> Plan:
    windows = model_spec(made.config).windows
    return Plan(RULES, sink=4, block=4, min_span=8, windows=windows)


def close(found: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=0, atol=ATOL)


OPENED: list[Any] = [
    open_session,
    *(
        pytest.param(
            partial(open_cpu_session, instruction_set=name, threads=3),
            marks=needs_compiler,
            id=name,
        )
        for name in host_sets()
    ),
]
backends = pytest.mark.parametrize("opened", OPENED)


@backends
@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_options_equal_the_library(
    opened: Callable[..., Batch], family: str, options: dict[str, Any]
) -> None:
    made, tokens = tiny_model(family, **options), text(LENGTH)
    plan = plan_of(made)
    wanted = oracle_logits(made, tokens, plan, LENGTH)
    close(opened(made, plan, capacity=LENGTH).each([tokens])[0], wanted)
    session = opened(made, plan, capacity=LENGTH, chunk=7)
    close(session.each([tokens[:50]])[0], wanted[:50])
    close(session.by_decode([tokens[50:]])[0], wanted[50:])
    plain = oracle_logits(model(family), tokens, plan, LENGTH)
    assert (plain - wanted).abs().max() > 100 * ATOL


@backends
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("rows", [2, 5, 17])
def test_rows_of_one_step_choose_each_for_itself(
    opened: Callable[..., Batch], family: str, rows: int
) -> None:
    made = model(family)
    plan, texts = plan_of(made), [text(30 + seed % 3, seed) for seed in range(rows)]
    session = opened(made, plan, capacity=LENGTH, batch=rows)
    first = session.each([row[:-4] for row in texts])
    rest = session.by_decode([row[-4:] for row in texts])
    for row, head, tail in zip(texts, first, rest, strict=True):
        close(torch.cat([torch.as_tensor(head), tail]), oracle_logits(made, row, plan, LENGTH))


@backends
@pytest.mark.parametrize("family", MIXTURES)
def test_a_sparse_plan_differs_past_its_spans_and_not_before(
    opened: Callable[..., Batch], family: str
) -> None:
    made, tokens = model(family), text(LENGTH)
    plan, dense = plan_of(made), plan_of(made).undropping()
    sparse = torch.as_tensor(opened(made, plan, capacity=LENGTH).each([tokens])[0])
    whole = torch.as_tensor(opened(made, dense, capacity=LENGTH).each([tokens])[0])
    least = min(head.size for layer in plan.spans(LENGTH) for head in layer)
    close(sparse[:least], whole[:least])
    assert (sparse[least:] - whole[least:]).abs().max() > 100 * ATOL


def chosen_experts(made: Any, tokens: list[int]) -> list[set[int]]:
    """Which experts each layer's router of the library gives the last token to."""
    found: list[set[int]] = []
    hooks = [
        part.register_forward_hook(lambda *told: found.append(set(told[2][2][-1].tolist())))
        for name, part in made.named_modules()
        if name.endswith((".mlp.gate", ".mlp.router"))
    ]
    made.set_attn_implementation("eager")
    made(torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@needs_compiler
@pytest.mark.parametrize("kernels", host_sets())
@pytest.mark.parametrize("family", MIXTURES)
def test_a_decode_step_reads_chosen_experts_alone(family: str, kernels: str) -> None:
    """All others are numbers that would spoil every sum they were part of."""
    made, tokens = model(family), text(20)
    plan = plan_of(made).undropping()
    spec, order = model_spec(made.config), head_order(plan)
    packed = pack_weights(checkpoint_tensors(made).__getitem__, spec, order)
    tensors = {name: tensor.clone().contiguous() for name, tensor in packed}
    engine = CpuEngine(
        kernels_of(kernels),
        spec,
        {name: tensor.data_ptr() for name, tensor in tensors.items()},
        dtype="float32",
        threads=2,
        memory=tensors,
    )
    session = Batch(CpuSession(engine, plan, order), batch=1, capacity=LENGTH)
    session.last([tokens[:-1]])
    chosen = iter(chosen_experts(made, tokens))
    for index in range(spec.num_layers):
        own = spec.layer(index).experts
        if own is None:
            continue
        kept = next(chosen)
        assert len(kept) == own.chosen
        for name in ("gate_up", "down"):
            every = tensors[f"layers.{index}.experts.{name}.weight"]
            for expert, part in enumerate(every.view(own.count, -1)):
                if expert not in kept:
                    part.fill_(float("nan"))
    found = session.decode([tokens[-1]])
    close(found[0], oracle_logits(made, tokens, plan, LENGTH)[-1])


@pytest.mark.parametrize("family", MIXTURES)
def test_the_bytes_of_a_step_are_those_of_the_chosen(family: str) -> None:
    spec = model_spec(model(family).config)
    as_dense = replace(
        spec,
        kinds=tuple(
            replace(kind, experts=None, intermediate_size=kind.mlp_width) for kind in spec.kinds
        ),
    )
    routers = sum(
        own.experts.count * (spec.hidden_size + own.experts.router_bias)
        for own in map(spec.layer, range(spec.num_layers))
        if own.experts is not None
    )
    # every chosen expert has a bias of its own on what it adds
    biases = sum(
        spec.hidden_size * (own.experts.chosen - 1)
        for own in map(spec.layer, range(spec.num_layers))
        if own.experts is not None and own.mlp_bias
    )
    dense = weight_bytes_read(as_dense, 4)
    assert weight_bytes_read(spec, 4) == dense + 4 * (routers + biases)


@needs_compiler
@pytest.mark.parametrize("kernels", host_sets())
def test_equal_logits_go_to_the_first_experts(kernels: str) -> None:
    """So the native kernels say; torch says nothing of it."""
    made: Any = tiny_model("mixtral")
    first: Any = tiny_model("mixtral", num_local_experts=2)
    weights = dict(made.named_parameters())
    for name, weight in first.named_parameters():
        weight.copy_(weights[name][:2] if "experts" in name else weights[name][: len(weight)])
    for layer in (*made.model.layers, *first.model.layers):
        layer.mlp.gate.weight.zero_()
    plan, tokens = plan_of(made), text(24)
    session = open_cpu_session(made, plan, instruction_set=kernels, capacity=LENGTH)
    close(session.each([tokens])[0], oracle_logits(first, tokens, plan, LENGTH))


def test_layers_are_mixtures_where_the_config_says() -> None:
    options = {"num_hidden_layers": 6, "mlp_only_layers": [3], "decoder_sparse_step": 2}
    spec = model_spec(tiny_model("qwen3_moe", **options).config)
    mixed = [spec.layer(index).experts is not None for index in range(6)]
    assert mixed == [False, True, False, False, False, True]
    assert spec.mlp_widths == (96, 96, 96, 96, 96, 96)
    assert spec.stored_mlp_widths == (96, 384, 96, 96, 96, 384)


@pytest.mark.parametrize("family", MIXTURES)
def test_errors_of_rounding_touch_every_expert_and_no_router(family: str) -> None:
    made = tiny_model(family)
    before = {name: weight.clone() for name, weight in made.named_parameters()}
    disturb_roundings(made, torch.bfloat16, seed=0)
    eps, changed = torch.finfo(torch.bfloat16).eps, set()
    for name, weight in made.named_parameters():
        moved = (weight - before[name]).abs()
        assert (moved <= 1.001 * eps * before[name].abs()).all(), name
        if moved.any():
            changed.add(name)
            assert moved.count_nonzero() > 0.9 * moved.numel(), name
    kept = ("norm.weight", "bias", ".sinks", "mlp.gate.weight", "mlp.router.weight")
    assert changed == {name for name in before if not name.endswith(kept)}


def test_a_mixture_s_limit_covers_choices_that_fall_otherwise(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most of several runs; of a dense model, whose errors do not jump, that of one."""
    drawn: list[float] = []

    def errs(*_: object) -> float:
        drawn.append(float(len(drawn) + 1))
        return drawn[-1]

    monkeypatch.setattr(compiler, "largest_error", errs)
    for family, runs in (("llama", 1), ("mixtral", 1 + compiler.DISTURBED_DRAWS)):
        drawn.clear()
        checkpoint = open_checkpoint(str(tiny_checkpoint(family)))
        request = CompileRequest(dtype="bfloat16")
        bench: Any = SimpleNamespace(
            checkpoint=checkpoint, request=request, tokenizer=checkpoint.load_tokenizer()
        )
        plan = plan_of(model(family))
        _, limits = compiler.golden_prompts(bench, plan, 100, "bfloat16", {})
        assert limits["bfloat16"] == 2.0 * runs == 2 * drawn[-1]


@pytest.mark.parametrize("family", MIXTURES)
def test_what_targets_lack_is_named(family: str) -> None:
    spec = model_spec(model(family).config)
    with pytest.raises(UsageError, match="the templates lack"):
        require_kernels(spec, None, "bfloat16")
    with pytest.raises(UsageError, match="the ONNX graph has no mixture of experts"):
        require_onnx(spec)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not served"),
        ("olmoe", {"head_dim": 32}, "head_dim 32 is not served"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 of 8 experts a token"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size 0 where a positive"),
        ("qwen3_moe", {"num_experts": 9}, "lacks the tensor model.layers.1.mlp.experts.8."),
        ("gpt_oss", {"swiglu_limit": 0.0}, "swiglu_limit 0.0 where a positive number"),
    ],
)
def test_configs_that_are_not_served(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    words: str,
) -> None:
    for file in tiny_checkpoint(family).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    if "num_experts" in changes:
        config.pop("num_local_experts", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(tmp_path))
