"""Influence: equal to its definition written out, true to first order, linear in memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from torch import Tensor

from moac.calibration import CalibrationSample
from moac.planning import HeadLayout
from moac.planning.objectives import ANSWERS, COUNTING, length_objectives
from moac.profiling import attention as profiled
from moac.profiling.attention import InfluenceRecorder, influence_attention
from moac.profiling.hooks import INFLUENCE, REFERENCE, attention
from moac.profiling.influence import (
    _profiled_loss,
    backward_bytes,
    recomputed_layers,
    sample_influence,
)
from moac_kernels.reference import layer_mask, masked_attention, rounded_heads
from moac_runtime.package.kv_format import KV_BITS
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, HeadSpan, Rule, visible

SINK, BLOCK, KV_HEADS, GROUP, DIM = 32, 16, 2, 3, 16
SCALE = DIM**-0.5
# logits of the query heads beside their scores: some count for little, some for half of a softmax
SINKS = torch.tensor([-2.0, 0.0, 1.0, 2.0, 3.0, 4.0])
scorings = pytest.mark.parametrize(
    ("cap", "sinks"), [(None, None), (0.7, None), (None, SINKS), (0.7, SINKS)]
)


def _qkv(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    q = torch.randn(1, KV_HEADS * GROUP, length, DIM, requires_grad=True)
    k = torch.randn(1, KV_HEADS, length, DIM, requires_grad=True)
    v = torch.randn(1, KV_HEADS, length, DIM, requires_grad=True)
    return q, k, v, torch.randn(1, KV_HEADS * GROUP, length, DIM)


def _masks(length: int, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = (j <= i) & (i - j < (window or length))
    return i, j, seen


def _by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    span: int,
    window: int | None,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The joint form, dense and span by span: `[kv_heads]`."""
    length = q.shape[2]
    i, j, seen = _masks(length, window)
    keys, values = k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)
    scores = (q @ keys.mT) * SCALE
    scores = scores if cap is None else cap * (scores / cap).tanh()
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(-1, -1, length, 1)], dim=-1)
    weights = scores.softmax(-1)[..., :length]
    delta = (grad * (weights @ values)).sum(-1, keepdim=True)
    dropped = (j >= SINK) & (i - j >= span - SINK) & seen
    mass = (weights * dropped).sum(-1)
    flow = (weights * (grad @ values.mT - delta) * dropped).sum(-1)
    joint = -flow / (1 - mass).clamp_min(1e-3)
    return joint.sum((0, 2)).view(KV_HEADS, GROUP).sum(1)


@pytest.mark.parametrize(("length", "window"), [(300, None), (256, None), (333, 100), (40, None)])
@pytest.mark.parametrize("tile", [1 << 21, 1 << 13])
@scorings
def test_influence_equals_its_definition(
    length: int,
    window: int | None,
    tile: int,
    cap: float | None,
    sinks: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiled, "TILE_ELEMENTS", tile)
    q, k, v, grad = _qkv(length)
    recorder = InfluenceRecorder(SINK, BLOCK, (window,))
    asked: Any = {"scale": SCALE, "cap": cap, "sinks": sinks, "layer": 0, "recorder": recorder}
    influence_attention(q, k, v, **asked).backward(grad)
    table = recorder.tables[0]
    assert table.shape == (KV_HEADS, -(-length // BLOCK) + 1)
    assert table[:, : SINK // BLOCK + 1].isinf().all()
    for entry in range(SINK // BLOCK + 1, table.shape[1]):
        expected = _by_definition(q, k, v, grad, entry * BLOCK, window, cap, sinks)
        torch.testing.assert_close(table[:, entry], expected.double(), atol=2e-4, rtol=1e-4)
    assert table[:, -1].abs().max() == 0  # a span of the whole length drops nothing


@pytest.mark.parametrize("window", [None, 100])
@scorings
def test_the_backward_pass_is_that_of_attention(
    window: int | None, cap: float | None, sinks: Tensor | None
) -> None:
    q, k, v, grad = _qkv(200)
    recorder = InfluenceRecorder(SINK, BLOCK, (window,))
    asked: Any = {"scale": SCALE, "cap": cap, "sinks": sinks, "layer": 0, "recorder": recorder}
    found = influence_attention(q, k, v, **asked)
    gradients = torch.autograd.grad(found, (q, k, v), grad)
    *_, seen = _masks(200, window)
    plain = masked_attention(q, k, v, seen, SCALE, cap, sinks=sinks)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(plain, (q, k, v), grad), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_influence_is_the_exact_change_of_a_linear_loss() -> None:
    """With a loss linear in the output, dropping one head's keys changes it by just that much."""
    q, k, v, grad = _qkv(160)
    recorder = InfluenceRecorder(SINK, BLOCK, (None,))
    dense = influence_attention(q, k, v, scale=SCALE, layer=0, recorder=recorder)
    dense.backward(grad)
    span = 64
    heads = [HeadSpan(span, SINK), HeadSpan(160, 0)]
    place = torch.arange(160)
    mask = layer_mask(lambda i, j, h: visible(i, j, heads[h]), place, place, KV_HEADS)
    sparse = masked_attention(q, k, v, mask, SCALE)
    change = ((sparse - dense) * grad).sum()
    torch.testing.assert_close(
        change.double(), recorder.tables[0][0, span // BLOCK], atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("window", [None, 100])
@scorings
def test_around_a_plan_influence_is_the_exact_change_of_a_linear_loss(
    window: int | None, cap: float | None, sinks: Tensor | None
) -> None:
    """Each span against all keys, the other head at its span of the plan."""
    q, k, v, grad = _qkv(200)
    held = (96, 144)
    recorder = InfluenceRecorder(SINK, BLOCK, (window,), held=[held])
    asked: Any = {"scale": SCALE, "cap": cap, "sinks": sinks, "layer": 0, "recorder": recorder}
    around = influence_attention(q, k, v, **asked)
    gradients = torch.autograd.grad(around, (q, k, v), grad)

    def attend(sizes: tuple[int, ...]) -> Tensor:
        i, j, seen = _masks(200, window)
        near = torch.stack([seen & ((i - j < size - SINK) | (j < SINK)) for size in sizes])
        return masked_attention(q, k, v, near, SCALE, cap, sinks=sinks)

    expected = attend(held)
    torch.testing.assert_close(around, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(
        gradients, torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    everything = 200 + SINK
    for head in range(KV_HEADS):
        sizes = list(held)
        sizes[head] = everything
        full = (attend(tuple(sizes)) * grad).sum()
        for entry in (3, 5, 9, 12):
            sizes[head] = entry * BLOCK
            change = (attend(tuple(sizes)) * grad).sum() - full
            found = recorder.tables[0][head, entry]
            torch.testing.assert_close(found, change.double(), atol=2e-3, rtol=1e-3)


def test_around_a_plan_that_drops_nothing_influence_is_that_of_the_dense_model() -> None:
    model = tiny_model("llama").requires_grad_(False)
    sample, layout = _sample(200), _layout(model)
    dense = sample_influence(model, _spec(model), sample, layout)
    around = sample_influence(model, _spec(model), sample, layout, layout.uniform(DENSE))
    torch.testing.assert_close(around, dense, atol=1e-5, rtol=1e-3)
    narrow = sample_influence(model, _spec(model), sample, layout, layout.uniform(Rule(64, 0.0)))
    entry = SINK // BLOCK + 1
    assert (narrow[..., entry] - dense[..., entry]).abs().max() > 1e-4


def test_a_planted_value_carries_the_loss_alone() -> None:
    """And of its tokens the least sure one most: tokens of the answer's wording change nothing."""
    model = tiny_model("llama").requires_grad_(False)
    whole = _sample(200)
    logits = torch.randn(14, 300, generator=torch.Generator().manual_seed(2))
    told = replace(whole, values=((182, 185),))
    assert told.decisive == ((182, 185),)
    assert whole.decisive == whole.believed
    odds = [
        float(_profiled_loss(replace(whole, values=((p, p + 1),)), logits[p - 180][None]))
        for p in range(182, 185)
    ]
    found = float(_profiled_loss(told, logits[2:5]))
    assert found == pytest.approx(math.log(sum(math.exp(o) for o in odds)), rel=1e-4)
    assert max(odds) < found < max(odds) + math.log(3)
    layout = _layout(model)
    of_value = sample_influence(model, _spec(model), told, layout)
    of_answers = sample_influence(model, _spec(model), whole, layout)
    entry = SINK // BLOCK + 1
    assert (of_value[..., entry] - of_answers[..., entry]).abs().max() > 1e-5


def test_sink_off_the_block_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of block"):
        InfluenceRecorder(sink=10, block=16, windows=(None,))


def _layout(model: object) -> HeadLayout:
    config = model.config  # type: ignore[attr-defined]
    windows = (None,) * config.num_hidden_layers
    return HeadLayout(config.num_key_value_heads, SINK, BLOCK, 48, windows)


def _sample(length: int, domain: str = "retrieval") -> CalibrationSample:
    tokens = torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(1))
    spans = ((length - 20, length - 12), (length - 6, length))
    return CalibrationSample(domain, length + 10, tuple(tokens.tolist()), spans, (True, True))


def _spec(model: object) -> object:
    from moac.checkpoint.families import model_spec

    return model_spec(model.config)  # type: ignore[attr-defined]


@pytest.mark.parametrize("domain", ["retrieval", "text"])
@pytest.mark.parametrize("anew", [1, 2])
@pytest.mark.parametrize("name", ["llama", "phi3", "stablelm"])
def test_recomputing_activations_changes_nothing(
    domain: str, anew: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what some configs ask for of training is not asked for here
    dropouts = {"phi3": {"resid_pdrop": 0.5}, "stablelm": {"hidden_dropout": 0.5}}
    model = tiny_model(name, **dropouts.get(name, {})).requires_grad_(False)
    spec, sample, layout = _spec(model), _sample(200, domain), _layout(model)
    kept = sample_influence(model, spec, sample, layout)
    scored = sum(end - start for start, end in sample.decisive)
    whole = backward_bytes(spec, len(sample.token_ids), scored, 4)
    limit = 0 if anew == 2 else whole - 1
    monkeypatch.setattr("moac.profiling.influence.ACTIVATION_BYTES_LIMIT", limit)
    assert recomputed_layers(spec, len(sample.token_ids), scored, 4) == anew
    layers, passes = model.model.layers, Counter[int]()
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: passes.update([number]))
    recomputed = sample_influence(model, spec, sample, layout)
    assert passes == {number: 1 + (number < anew) for number in range(len(layers))}
    torch.testing.assert_close(kept, recomputed, atol=1e-6, rtol=1e-5)
    assert kept.shape == (2, 2, -(-210 // BLOCK) + 1)
    assert not model.training
    assert kept[..., SINK // BLOCK + 1].abs().max() > 0


def test_reference_attention_runs_a_plan_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen3").eval()
    layout = _layout(model)
    ids = torch.randint(5, 300, (1, 200))
    found = []
    with torch.inference_mode():
        dense = model(input_ids=ids).logits
        for rules in ([[DENSE, DENSE]] * 2, [[Rule(64, 0.0), DENSE], [DENSE, Rule(96, 0.0)]]):
            with attention(model, REFERENCE):
                spans = layout.plan(rules).spans(200)
                found.append(model(input_ids=ids, moac_spans=spans).logits)
    torch.testing.assert_close(found[0], dense, atol=1e-4, rtol=1e-4)
    assert (found[1] - dense).abs().max() > 1e-2
    assert model.config._attn_implementation not in (REFERENCE, INFLUENCE)


@pytest.mark.parametrize("domains", [("retrieval", "text"), ("text", "documents"), ("a", "b")])
def test_a_domain_weighs_the_same_however_large_its_loss(domains: tuple[str, str]) -> None:
    layout = _layout(tiny_model("llama"))
    samples, tables = _profiled(*domains)
    (objective,) = length_objectives(samples, tables, _reference(layout))
    (swapped,) = length_objectives(samples, [tables[0], 1000 * tables[1]], _reference(layout))
    torch.testing.assert_close(
        torch.tensor(objective.table), torch.tensor(swapped.table), rtol=1e-6, atol=1e-9
    )


def test_the_size_of_a_narrower_span_is_never_below_a_wider_ones() -> None:
    layout = _layout(tiny_model("llama"))
    (objective,) = length_objectives(*_profiled("text"), _reference(layout))
    assert (objective.table[..., :-1] >= objective.table[..., 1:]).all()


def test_what_answers_gain_together_counts_for_a_span() -> None:
    """Two heads of the same size: one loses in every sample, the other as often wins."""
    layout = _layout(tiny_model("llama"))
    samples, (table,) = _profiled("retrieval")
    first, second = torch.zeros_like(table), torch.zeros_like(table)
    first[0, 0, :6], second[0, 0, :6] = 1.0, 1.0
    first[0, 1, :6], second[0, 1, :6] = 1.0, -1.0
    first[1, 0, :6], second[1, 0, :6] = -1.0, -1.0
    (objective,) = length_objectives(samples * 2, [first, second], _reference(layout))
    loses, even, wins = (
        objective.table[0, 0, 4],
        objective.table[0, 1, 4],
        objective.table[1, 0, 4],
    )
    assert wins < even < loses
    assert loses - even == pytest.approx(even - wins)
    assert loses - even == pytest.approx(ANSWERS.gain * even)


def test_domains_count_by_their_weights_and_powers_in_units_of_the_reference() -> None:
    layout = _layout(tiny_model("llama"))
    reference = _reference(layout)
    samples, tables = _profiled("retrieval", "user", "documents", "text")
    (objective,) = length_objectives(samples, tables, reference)
    expected, weights = 0.0, 0.0
    for table, (weight, power) in zip(
        tables,
        [
            *[(ANSWERS.weight, 1)] * 2,
            (COUNTING["documents"].weight, 2),
            (COUNTING["text"].weight, 2),
        ],
        strict=True,
    ):
        narrower_costs_more = table.double().numpy()[..., ::-1]
        costs = np.maximum.accumulate(narrower_costs_more, axis=-1)[..., ::-1] ** power
        unit = costs[..., 64 // BLOCK].sum()  # every head of the reference has 64 tokens
        if weight == ANSWERS.weight:
            costs = costs + ANSWERS.gain * table.double().numpy()
        expected, weights = expected + weight * costs / unit, weights + weight
    np.testing.assert_allclose(objective.table, expected / weights, rtol=1e-9)
    assert ANSWERS.weight > COUNTING["text"].weight > COUNTING["documents"].weight > 0


def test_answers_of_other_lengths_count_for_spans_of_the_same_share() -> None:
    """A short sample's answer needs half of its length: so may a long one's, most of the way."""
    layout = _layout(tiny_model("llama"))
    samples, (table,) = _profiled("retrieval")
    short, long = torch.zeros_like(table), torch.zeros(2, 2, 2 * 160 // BLOCK + 1)
    short[0, 0, :5] = 1.0
    long[1, 1, :9] = 1.0
    both = [samples[0], replace(samples[0], length=320)]
    tables = [short, long]
    objectives = length_objectives(both, tables, _reference(layout))
    alone = [
        length_objectives([s], [t], _reference(layout))[0].table
        for s, t in zip(both, tables, strict=True)
    ]
    assert (alone[1][0, 0] == 0).all()
    assert (objectives[1].table[0, 0, :9] > 0).all()
    assert (objectives[1].table[0, 0, 10:] == 0).all()
    assert (objectives[0].table[1, 1, :5] > 0).all()
    assert (objectives[0].table[1, 1, 5:] == 0).all()
    heads = (((0, 0), (1, 1)), ((1, 1), (0, 0)))
    for objective, (mine, lent) in zip(objectives, heads, strict=True):
        assert 1 < objective.table[mine][4] / objective.table[lent][4] < 1 / ANSWERS.lent


def _profiled(*domains: str) -> tuple[list[CalibrationSample], list[Tensor]]:
    """A sample of each domain at 160 tokens, and influence as large as one would have it."""
    generator = torch.Generator().manual_seed(0)
    samples = [CalibrationSample(name, 160, (1,), ((0, 1),), (None,)) for name in domains]
    return samples, [torch.rand(2, 2, 160 // BLOCK + 1, generator=generator) for _ in samples]


def _reference(layout: HeadLayout) -> Plan:
    return layout.uniform(Rule(64, 0.0))


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_profiling_stores_tables_not_matrices(length: int) -> None:
    """What outlives a backward pass is O(heads x spans), and no tile passes its fixed size."""
    sizes: list[int] = []
    original = profiled._Backward.tile

    def spying(self: profiled._Backward, start: int, block: int) -> profiled._Tile:
        tile = original(self, start, block)
        sizes.append(tile.weights.numel())
        return tile

    q, k, v, grad = _qkv(length)
    recorder = InfluenceRecorder(SINK, BLOCK, (None,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiled._Backward, "tile", spying)
        influence_attention(q, k, v, scale=SCALE, layer=0, recorder=recorder).backward(grad)
    assert max(sizes) <= max(profiled.TILE_ELEMENTS, KV_HEADS * GROUP * BLOCK * length)
    assert recorder.tables[0].numel() == KV_HEADS * (length // BLOCK + 1)


@pytest.mark.parametrize("window", [None, 100])
@scorings
def test_rounding_counts_for_the_keys_that_a_span_holds(
    window: int | None, cap: float | None, sinks: Tensor | None
) -> None:
    """Each table is the derivative of the loss where the pairs within a span alone are moved."""
    length = 200
    q, k, v, grad = _qkv(length)
    order = [*range(0, DIM, 2), *range(1, DIM, 2)]  # as a package orders the numbers of a key
    recorder = InfluenceRecorder(SINK, BLOCK, (window,), widths=(8, 4), key_orders=[order])
    asked: Any = {"scale": SCALE, "cap": cap, "sinks": sinks, "layer": 0, "recorder": recorder}
    influence_attention(q, k, v, **asked).backward(grad)
    assert recorder.rounding[0].shape == (2, *recorder.tables[0].shape)
    for place, bits in enumerate((8, 4)):
        key_error = rounded_heads(k, [bits] * KV_HEADS, order) - k
        value_error = rounded_heads(v, [bits] * KV_HEADS) - v
        assert key_error.abs().max() > 1e-3
        for entry in (3, 6, 13):
            i, j, seen = _masks(length, window)
            held = (i - j < entry * BLOCK - SINK) | (j < SINK) if entry < 13 else seen
            for head in range(KV_HEADS):
                wanted = _moved(
                    q, k, v, grad, key_error, value_error, seen, held, head, cap, sinks
                )
                found = recorder.rounding[0][place, head, entry]
                torch.testing.assert_close(found, wanted.double(), atol=1e-3, rtol=1e-3)


def _moved(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    key_error: Tensor,
    value_error: Tensor,
    seen: Tensor,
    held: Tensor,
    head: int,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """How the loss moves with the errors of one KV head, for pairs that are `held`."""
    step = torch.zeros((), requires_grad=True)
    own = slice(head * GROUP, (head + 1) * GROUP)
    share = step * held
    scores = (q[:, own] @ k[:, [head]].mT + share * (q[:, own] @ key_error[:, [head]].mT)) * SCALE
    scores = scores if cap is None else cap * (scores / cap).tanh()
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks[own].view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    out = weights @ v[:, [head]] + (weights * share) @ value_error[:, [head]]
    (moved,) = torch.autograd.grad((out * grad[:, own]).sum(), step)
    return moved


def test_rounding_costs_count_by_squares_and_more_for_fewer_bits() -> None:
    layout = _layout(tiny_model("llama"))
    samples, tables = _profiled("text", "retrieval")
    rounding = [torch.stack([t, 0.01 * t.abs(), 0.1 * t.abs()]) for t in tables]
    plain = length_objectives(samples, tables, _reference(layout))
    (found,) = length_objectives(samples, rounding, _reference(layout))
    torch.testing.assert_close(torch.tensor(found.table), torch.tensor(plain[0].table))
    assert sorted(found.rounding) == [4, 8]
    assert (found.rounding[4] > 99 * found.rounding[8]).all()
    assert (found.losses(4) >= found.losses(None)).all()
    assert found.losses(None) is found.table
    assert plain[0].rounding == {}


def test_rounding_is_profiled_around_a_plan_and_padded_to_the_length() -> None:
    model, sample = tiny_model("llama").requires_grad_(False), _sample(200)
    layout = _layout(model)
    spans = sample_influence(model, _spec(model), sample, layout)
    both = sample_influence(model, _spec(model), sample, layout, widths=KV_BITS)
    assert both.shape == (3, *spans.shape)
    torch.testing.assert_close(both[0], spans)
    assert both[1:].isfinite().all()
    assert both[1].abs().max() < both[2].abs().max()
    plan = layout.uniform(Rule(64, 0.0))
    around = sample_influence(model, _spec(model), sample, layout, plan, widths=KV_BITS)
    assert around.isfinite()[1:].all()
    assert (around[1:] != both[1:]).any()
