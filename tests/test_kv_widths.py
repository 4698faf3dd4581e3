"""Sessions whose heads hold keys and values in 8 and 4 bits, on the torch backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model
from oracle import grown_masks, masked_logits, open_session, oracle_logits, widths
from plans import plan_of
from torch import Tensor

from moac.checkpoint.families import model_spec
from moac_runtime.backends.session import Feed
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule

LENGTH = 64
ATOL = 2e-4
FLIPPED = 0.05  # what a number that falls to the other side of a half may move in a tiny model


MIXED = plan_of((Rule(0, 0.25, 8), DENSE), (Rule(-8, 0.125, 4), Rule(0, 0.5, 8)))


def in_bits(bits: int, windows: tuple[int | None, ...] = (None, None)) -> Plan:
    rules = tuple(tuple(replace(r, bits=bits) for r in layer) for layer in MIXED.rules)
    return replace(MIXED, rules=rules, windows=windows)


def text(count: int = LENGTH, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()


def near(found: Tensor, wanted: Tensor) -> None:
    """All but a few logits are the same; a flipped number may move those of its token a little.

    Sums of another order may lie on the other side of a half, and then one code of a key or a
    value is the next one.
    """
    off = (found - wanted).abs()
    assert off.max() < FLIPPED
    assert (off.amax(-1) < ATOL).float().mean() > 0.5


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("bits", [8, 4])
def test_a_session_is_the_oracles_and_far_from_unrounded(family: str, bits: int) -> None:
    model, tokens = tiny_model(family), text()
    plan = in_bits(bits, model_spec(model.config).windows)
    wanted = oracle_logits(model, tokens, plan, LENGTH)
    full = oracle_logits(model, tokens, plan.unrounded(), LENGTH)
    assert (wanted - full).abs().max() > 1e-2
    near(open_session(model, plan, capacity=LENGTH).each([tokens])[0], wanted)


@pytest.mark.parametrize("plan", [MIXED, in_bits(8), in_bits(4)], ids=["mixed", "8", "4"])
@pytest.mark.parametrize("sinks", ["llama", "gpt_oss"])
def test_prefill_chunks_and_decode_see_the_same_numbers(plan: Plan, sinks: str) -> None:
    model, tokens = tiny_model(sinks), text()
    plan = replace(plan, windows=model_spec(model.config).windows)
    wanted = oracle_logits(model, tokens, plan, LENGTH)
    near(open_session(model, plan, capacity=LENGTH, chunk=7).each([tokens])[0], wanted)
    near(open_session(model, plan, capacity=LENGTH).by_decode([tokens])[0], wanted)


def test_rows_side_by_side_equal_each_alone() -> None:
    model, texts = tiny_model("llama"), [text(seed=1), text(seed=2), text(seed=3)]
    session = open_session(model, MIXED, capacity=LENGTH, batch=3)
    found = session.by_decode(texts)
    for row, tokens in zip(found, texts, strict=True):
        near(row, oracle_logits(model, tokens, MIXED, LENGTH))


def test_a_bfloat16_engine_is_nearer_to_the_rounded_model_than_the_unrounded_one_is() -> None:
    """In 4 bits: bfloat16 itself errs about as much as 8 bits do."""
    model, tokens, plan = tiny_model("llama"), text(), in_bits(4)
    exact = oracle_logits(model, tokens, plan, LENGTH)
    full = oracle_logits(model, tokens, plan.unrounded(), LENGTH)
    session = open_session(model, plan, capacity=LENGTH, dtype=torch.bfloat16)
    found = session.each([tokens])[0]
    assert (found - exact).abs().mean() < (full - exact).abs().mean() / 1.5


@pytest.mark.parametrize("capacity", [1, 9, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocated_bytes_are_the_plans(capacity: int, dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    kv = model_spec(model.config).kv_shape(dtype.itemsize)
    session = open_session(model, MIXED, capacity=capacity, batch=2, dtype=dtype)
    assert session.kv_bytes() == 2 * MIXED.held_bytes(capacity, kv)
    session.grow(2 * capacity)
    assert session.kv_bytes() == 2 * MIXED.held_bytes(2 * capacity, kv)


@pytest.mark.parametrize("cut", [10, 30, 50])
def test_a_restored_row_goes_on_token_for_token(cut: int) -> None:
    model, tokens = tiny_model("llama"), text()
    session: Any = open_session(model, MIXED, capacity=LENGTH, batch=0).session
    row = session.admit(LENGTH)
    session.step([Feed(row, tokens[:cut])])
    snapshot = session.snapshot(row)
    data = session.packed(snapshot)
    assert len(data) == snapshot.bytes
    others = [session.restore(snapshot)]
    others.append(session.restore(session.unpacked([(LENGTH, 0)], cut, data)))
    wanted = [session.step([Feed(row, [token])]) for token in tokens[cut:]]
    for other in others:
        for token, logits in zip(tokens[cut:], wanted, strict=True):
            assert torch.equal(session.step([Feed(other, [token])]), logits)


def test_a_row_that_grows_keeps_its_numbers_as_they_were_rounded() -> None:
    model, tokens = tiny_model("llama"), text(120)
    phases = [(40, 36), (80, 70), (120, 120)]
    masks = [grown_masks(MIXED, layer, phases) for layer in range(2)]
    wanted = masked_logits(model, tokens, masks, widths(MIXED))
    session, first, parts = open_session(model, MIXED, capacity=40), 0, []
    for capacity, stop in phases:
        session.grow(capacity)
        parts.append(session.each([tokens[first:stop]])[0])
        first = stop
    near(torch.cat(parts), wanted)
