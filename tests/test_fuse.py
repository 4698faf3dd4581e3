"""Fused, permuted weights compute what the checkpoint's own weights compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from specs import plain_spec
from torch import Tensor
from torch.nn.functional import linear, silu

from moac.packaging.fuse import head_order, pack_weights
from moac_runtime.errors import CheckpointError
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule
from moac_runtime.package.spec import ModelSpec, RopeSpec
from moac_runtime.package.weights import expected_tensors

HIDDEN, INNER, DIM, VOCAB, LAYERS, LENGTH = 24, 20, 8, 32, 2, 12


def make_spec(kv_heads: int, group: int, *, bias: bool, qk_norm: bool = False) -> ModelSpec:
    return plain_spec(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=DIM,
        vocab_size=VOCAB,
        context=64,
        norm_eps=1e-6,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        qk_norm="head" if qk_norm else None,
        tied_embeddings=not bias,
        rope=RopeSpec("default", 1e4, tuple(1e4 ** (-2 * i / DIM) for i in range(DIM // 2))),
    )


def checkpoint(spec: ModelSpec) -> dict[str, Tensor]:
    """Random weights under the checkpoint's names, written out apart from the code under test."""
    wide, narrow, own = spec.num_heads * DIM, spec.num_kv_heads * DIM, spec.kinds[0]
    linears = {
        "self_attn.q_proj": (wide, HIDDEN, own.qkv_bias),
        "self_attn.k_proj": (narrow, HIDDEN, own.qkv_bias),
        "self_attn.v_proj": (narrow, HIDDEN, own.qkv_bias),
        "self_attn.o_proj": (HIDDEN, wide, own.o_bias),
        "mlp.gate_proj": (INNER, HIDDEN, own.mlp_bias),
        "mlp.up_proj": (INNER, HIDDEN, own.mlp_bias),
        "mlp.down_proj": (HIDDEN, INNER, own.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
        if own.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (DIM,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (DIM,)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def make_plan(kv_heads: int) -> Plan:
    """Rules that differ within a layer, so that heads must move."""
    wide, narrow, dense = Rule(0, 0.5), Rule(4, 0.0), Rule(0, 1.0)
    rows = ([narrow, dense, wide, narrow, dense, wide], [wide, narrow, narrow, dense, wide, wide])
    rules = tuple(tuple(row[:kv_heads]) for row in rows)
    return Plan(rules, sink=1, block=1, min_span=4, windows=(None,) * LAYERS)


def spans(rules: list[Rule]) -> list[int]:
    return [max(4, math.ceil(rule.alpha + rule.beta * LENGTH)) for rule in rules]


def attend(q: Tensor, k: Tensor, v: Tensor, sizes: list[int]) -> Tensor:
    """Windowed attention, head by head; `q` `[H, T, D]`, `k` and `v` `[K, T, D]`."""
    group = len(q) // len(k)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    heads = []
    for head, query in enumerate(q):
        scores = query @ k[head // group].T / math.sqrt(DIM)
        hidden = (distance < 0) | (distance >= sizes[head // group])
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        heads.append(weights @ v[head // group])
    return torch.cat(heads, dim=-1)


def heads_of(x: Tensor) -> Tensor:
    return x.reshape(LENGTH, -1, DIM).transpose(0, 1)


def original_attention(weights: dict[str, Tensor], layer: int, x: Tensor, plan: Plan) -> Tensor:
    def project(name: str, y: Tensor) -> Tensor:
        prefix = f"model.layers.{layer}.self_attn.{name}_proj"
        return linear(y, weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"))

    q, k, v = (heads_of(project(name, x)) for name in "qkv")
    return project("o", attend(q, k, v, spans(list(plan.rules[layer]))))


def packed_attention(
    weights: dict[str, Tensor], layer: int, x: Tensor, spec: ModelSpec, rules: list[Rule]
) -> Tensor:
    def project(name: str, y: Tensor) -> Tensor:
        prefix = f"layers.{layer}.{name}"
        return linear(y, weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"))

    keys, values = spec.num_heads * DIM, (spec.num_heads + spec.num_kv_heads) * DIM
    fused = project("qkv", x)
    parts = fused[:, :keys], fused[:, keys:values], fused[:, values:]
    q, k, v = (heads_of(part) for part in parts)
    return project("o", attend(q, k, v, spans(rules)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kv_heads", "group"), [(6, 1), (5, 3), (3, 4), (1, 4)])
def test_packed_attention_equals_the_checkpoints(kv_heads: int, group: int, bias: bool) -> None:
    spec, plan = make_spec(kv_heads, group, bias=bias), make_plan(kv_heads)
    source, order = checkpoint(spec), head_order(plan)
    packed = dict(pack_weights(source.__getitem__, spec, order))
    x = torch.randn(
        LENGTH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    for layer in range(LAYERS):
        rules = [plan.rules[layer][head] for head in order[layer]]
        expected = original_attention(source, layer, x, plan)
        found = packed_attention(packed, layer, x, spec, rules)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_mlp_equals_the_checkpoints(bias: bool) -> None:
    spec = make_spec(3, 2, bias=bias)
    source = checkpoint(spec)
    packed = dict(pack_weights(source.__getitem__, spec, head_order(make_plan(3))))
    x = torch.randn(LENGTH, HIDDEN, dtype=torch.float64)

    def apply(weights: dict[str, Tensor], prefix: str, y: Tensor) -> Tensor:
        return linear(y, weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"))

    old, new = "model.layers.1.mlp", "layers.1"
    expected = silu(apply(source, f"{old}.gate_proj", x)) * apply(source, f"{old}.up_proj", x)
    gate, up = apply(packed, f"{new}.gate_up", x).chunk(2, dim=-1)
    torch.testing.assert_close(
        apply(packed, f"{new}.down", silu(gate) * up),
        apply(source, f"{old}.down_proj", expected),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_names_and_shapes_are_the_expected_ones(bias: bool, qk_norm: bool) -> None:
    spec = make_spec(3, 2, bias=bias, qk_norm=qk_norm)
    packed = pack_weights(checkpoint(spec).__getitem__, spec, head_order(make_plan(3)))
    shapes = [(name, tuple(tensor.shape)) for name, tensor in packed]
    assert shapes == list(expected_tensors(spec).items())


def test_unpermuted_layers_and_norms_pass_through() -> None:
    spec = make_spec(3, 2, bias=True, qk_norm=True)
    source = checkpoint(spec)
    packed = dict(pack_weights(source.__getitem__, spec, head_order(make_plan(3))))
    assert packed["embed.weight"] is source["model.embed_tokens.weight"]
    assert packed["lm_head.weight"] is source["lm_head.weight"]
    assert (
        packed["layers.1.mlp_norm.weight"]
        is (source["model.layers.1.post_attention_layernorm.weight"])
    )
    assert packed["layers.1.k_norm.weight"] is source["model.layers.1.self_attn.k_norm.weight"]


def test_equal_rules_are_adjacent_widest_first_and_stable() -> None:
    rules = (Rule(0, 0.25), Rule(64, 0.5), Rule(0, 0.5), Rule(0, 0.25), Rule(64, 0.5))
    plan = Plan((rules,), sink=4, block=4, min_span=8, windows=(None,))
    assert head_order(plan) == ((1, 4, 2, 0, 3),)


def test_one_layer_at_a_time_is_read() -> None:
    spec = make_spec(3, 2, bias=False)
    asked: list[str] = []
    source = checkpoint(spec)

    def read(name: str) -> Tensor:
        asked.append(name)
        return source[name]

    for name, _ in pack_weights(read, spec, head_order(make_plan(3))):
        if name == "layers.0.down.weight":
            break
    assert any(".layers.0." in name for name in asked)
    assert not any(".layers.1." in name for name in asked)


def drain(source: Callable[[str], Tensor], spec: ModelSpec, order: list[list[int]]) -> None:
    for _ in pack_weights(source, spec, order):
        pass


def test_a_weight_of_another_shape_is_refused() -> None:
    spec = make_spec(3, 2, bias=False)
    wider = replace(spec, kinds=(replace(spec.kinds[0], intermediate_size=INNER + 4),))
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight has shape \[20, 24\].*\[24, 24\]"
    ):
        drain(checkpoint(spec).__getitem__, wider, [[0, 1, 2]] * LAYERS)


@pytest.mark.parametrize("order", [[[0, 1, 2]], [[0, 1, 1]] * LAYERS, [[0, 1]] * LAYERS])
def test_an_order_that_is_no_permutation_is_refused(order: list[list[int]]) -> None:
    spec = make_spec(3, 2, bias=False)
    with pytest.raises(ValueError, match="head_order"):
        drain(checkpoint(spec).__getitem__, spec, order)
