"""A learned logit in the softmax: what dropping keys costs beside it, by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from families import tiny_model
from torch import Tensor
from torch.nn import functional as F

from moac.calibration import CalibrationSample
from moac.checkpoint.families import model_spec
from moac.planning import HeadLayout
from moac.profiling import attention as profiled
from moac.profiling.attention import InfluenceRecorder, influence_attention
from moac.profiling.hooks import REFERENCE, attention
from moac.profiling.influence import sample_influence
from moac_kernels.reference import layer_mask, masked_attention
from moac_runtime.backends.torch.attention import sunk_softmax
from moac_runtime.package.span import DENSE, HeadSpan, Rule, visible

SINK, BLOCK, KV_HEADS, GROUP, DIM, LENGTH = 32, 16, 2, 3, 16, 200
SCALE = DIM**-0.5


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, the gradient of what comes out, and logits that weigh much."""
    torch.manual_seed(0)
    q = torch.randn(1, KV_HEADS * GROUP, LENGTH, DIM, requires_grad=True)
    k, v = (torch.randn(1, KV_HEADS, LENGTH, DIM, requires_grad=True) for _ in range(2))
    return q, k, v, torch.randn(1, KV_HEADS * GROUP, LENGTH, DIM), torch.linspace(-1, 6, 6)


def mask_of(sizes: tuple[int, ...], window: int | None) -> Tensor:
    """What the queries of heads with these spans see, `[K, T, T]`."""
    heads = [HeadSpan(size, SINK, window) for size in sizes]
    place = torch.arange(LENGTH)
    return layer_mask(lambda i, j, h: visible(i, j, heads[h]), place, place, KV_HEADS)


def written_out(q: Tensor, k: Tensor, v: Tensor, visible_: Tensor, sinks: Tensor) -> Tensor:
    """Exponentials summed one head at a time, the logit's own among them."""
    heads = []
    for head in range(q.shape[1]):
        own = head // GROUP
        powers = (q[0, head] @ k[0, own].T * SCALE).exp() * visible_[own]
        heads.append(powers @ v[0, own] / (powers.sum(-1, keepdim=True) + sinks[head].exp()))
    return torch.stack(heads)[None]


def test_the_reference_is_the_sum_written_out() -> None:
    q, k, v, _, sinks = tensors()
    mask = mask_of((96, 64), None)
    found = masked_attention(q, k, v, mask, SCALE, sinks=sinks)
    torch.testing.assert_close(found, written_out(q, k, v, mask, sinks), atol=1e-5, rtol=1e-5)
    assert (found - masked_attention(q, k, v, mask, SCALE)).abs().max() > 0.1
    none = masked_attention(q, k, v, torch.zeros_like(mask), SCALE, sinks=sinks)
    assert (none == 0).all()


def test_the_softmax_leaves_the_logits_share_out() -> None:
    scores, logit = torch.randn(3, 5), torch.tensor([[2.0], [0.0], [-math.inf]])
    found = sunk_softmax(scores, logit)
    torch.testing.assert_close(
        found, scores.exp() / (scores.exp().sum(-1, keepdim=True) + logit.exp())
    )
    assert torch.equal(sunk_softmax(scores, None), scores.softmax(-1))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("held", [None, (96, 144)])
@pytest.mark.parametrize("tile", [1 << 21, 1 << 13])
def test_influence_is_the_exact_change_of_a_linear_loss(
    window: int | None,
    held: tuple[int, int] | None,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Around the dense model and around a plan: each span against all keys."""
    monkeypatch.setattr(profiled, "TILE_ELEMENTS", tile)
    q, k, v, grad, sinks = tensors()
    recorder = InfluenceRecorder(SINK, BLOCK, (window,), held=None if held is None else [held])
    everything = LENGTH + SINK
    present = held or (everything, everything)

    def attend(sizes: tuple[int, ...]) -> Tensor:
        return written_out(q, k, v, mask_of(sizes, window), sinks)

    found = influence_attention(q, k, v, scale=SCALE, layer=0, recorder=recorder, sinks=sinks)
    gradients = torch.autograd.grad(found, (q, k, v), grad)
    expected = attend(present)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    by_hand = torch.autograd.grad(expected, (q, k, v), grad)
    for mine, theirs in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    for head in range(KV_HEADS):
        sizes = list(present)
        sizes[head] = everything
        full = (attend(tuple(sizes)) * grad).sum()
        for entry in (3, 5, 9, 12):
            sizes[head] = entry * BLOCK
            change = (attend(tuple(sizes)) * grad).sum() - full
            told = recorder.tables[0][head, entry]
            torch.testing.assert_close(told, change.double(), atol=2e-3, rtol=1e-3)


def sample() -> CalibrationSample:
    tokens = torch.randint(5, 300, (LENGTH,), generator=torch.Generator().manual_seed(1))
    spans = ((LENGTH - 20, LENGTH - 12), (LENGTH - 6, LENGTH))
    return CalibrationSample("retrieval", LENGTH, tuple(tokens.tolist()), spans, (True, True))


def loss(model: object, layout: HeadLayout, rules: list[list[Rule]]) -> float:
    """The log-odds that are profiled, of the model under a plan."""
    ids = torch.tensor([sample().token_ids])
    places = torch.cat([torch.arange(*span) for span in sample().decisive])
    with attention(model, REFERENCE):  # type: ignore[arg-type]
        out = model(ids, moac_spans=layout.plan(rules).spans(LENGTH), use_cache=False)  # type: ignore[operator]
    logits = out.logits[0, places - 1].double()
    answer = ids[0, places][:, None]
    others = logits.scatter(1, answer, -math.inf).logsumexp(-1)
    return float((others - logits.gather(1, answer)[:, 0]).mean())


def test_influence_on_gpt_oss_is_the_first_order_change_of_its_loss() -> None:
    """Of its last layer: between that and the loss lie a router, experts and the last norm."""
    model = tiny_model("gpt_oss")
    spec = model_spec(model.config)
    layout = HeadLayout(spec.num_kv_heads, SINK, BLOCK, 48, spec.windows)
    table = sample_influence(model, spec, sample(), layout)
    dense = [[DENSE] * 2, [DENSE] * 2]
    before, found, told = loss(model, layout, dense), [], []
    for head in range(2):
        for size in range(64, LENGTH, BLOCK):
            rules = [list(row) for row in dense]
            rules[1][head] = Rule(size, 0.0)
            found.append(loss(model, layout, rules) - before)
            told.append(float(table[1, head, size // BLOCK]))
    assert F.cosine_similarity(torch.tensor(found), torch.tensor(told), dim=0) > 0.9
