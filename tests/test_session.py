"""Sessions against transformers' own models under the dense reference attention."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from batches import WRONG_FEEDS, Batch
from families import FAMILIES, ROPES, VOCAB, tiny_model
from oracle import grown_masks, masked_logits, open_session, oracle_logits, packed
from plans import BLOCK, MIN_SPAN, MIXED, SINK, plan_of, text
from torch import Tensor
from transformers import PreTrainedModel

from moac_runtime.backends.torch import steps
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.package.plan import Plan, dense_plan
from moac_runtime.package.span import DENSE, Rule

ATOL = 2e-4


@cache
def model(family: str = "llama", **options: Any) -> PreTrainedModel:
    return tiny_model(family, **options)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_transformers(family: str) -> None:
    tokens = text(64)
    wanted = oracle_logits(model(family), tokens, MIXED, 64)
    close(open_session(model(family), MIXED, capacity=64).each([tokens])[0], wanted)
    close(open_session(model(family), MIXED, capacity=64).by_decode([tokens])[0], wanted)


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_equals_transformers(rope: str) -> None:
    tokens = text(96)
    wanted = oracle_logits(model(rope=rope), tokens, MIXED, 96)
    close(open_session(model(rope=rope), MIXED, capacity=96).each([tokens])[0], wanted)
    close(open_session(model(rope=rope), MIXED, capacity=96).by_decode([tokens])[0], wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "relu"},
    ],
)
def test_options_equal_transformers(options: dict[str, Any]) -> None:
    built, tokens = tiny_model("llama", **options), text(40)
    wanted = oracle_logits(built, tokens, MIXED, 64)
    close(open_session(built, MIXED, capacity=64).each([tokens])[0], wanted)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_groups_and_head_dims_equal_transformers(group: int, head_dim: int) -> None:
    built = tiny_model("llama", head_dim=head_dim, hidden_size=48, num_attention_heads=2 * group)
    rows = [text(40, seed=1), text(29, seed=2)]
    session = open_session(built, MIXED, capacity=64, batch=2, chunk=16)
    prefill = session.each([row[:-8] for row in rows])
    decode = session.by_decode([row[-8:] for row in rows])
    for row, head, tail in zip(rows, prefill, decode, strict=True):
        close(torch.cat([head, tail]), oracle_logits(built, row, MIXED, 64))


@pytest.mark.parametrize("span", range(MIN_SPAN, 49, BLOCK))
def test_every_span_equals_the_oracle_and_differs_from_dense(span: int) -> None:
    rule = Rule(span, 0.0)
    plan, tokens = plan_of((rule, rule), (rule, rule)), text(48)
    wanted = oracle_logits(model(), tokens, plan, 48)
    session = open_session(model(), plan, capacity=48)
    found = torch.cat([session.each([tokens[:20]])[0], session.by_decode([tokens[20:]])[0]])
    close(found, wanted)
    dense = oracle_logits(model(), tokens, plan_of((DENSE, DENSE), (DENSE, DENSE)), 48)
    close(found[:span], dense[:span])
    if span < 48:
        # from here on every row lacks a key that dense attention sees
        assert (found[span:] - dense[span:]).abs().amax(-1).min() > 10 * ATOL


def test_dense_while_every_span_reaches_the_capacity() -> None:
    tokens = text(32)
    dense = oracle_logits(model(), tokens, plan_of((DENSE, DENSE), (DENSE, DENSE)), 32)
    short = plan_of((Rule(32, 0.0), Rule(24, 0.25)), (Rule(64, 0.0), DENSE))
    assert short.density(32) == 1
    close(open_session(model(), short, capacity=32).each([tokens])[0], dense)


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 63])
def test_chunked_prefill_equals_whole(chunk: int) -> None:
    tokens = text(64)
    whole = open_session(model(), MIXED, capacity=64).each([tokens])[0]
    chunked = open_session(model(), MIXED, capacity=64, chunk=chunk).each([tokens])[0]
    close(chunked, whole)


def test_prefill_past_one_block_of_queries_equals_the_oracle() -> None:
    tokens = text(400)
    wanted = oracle_logits(model(), tokens, MIXED, 400)
    close(open_session(model(), MIXED, capacity=400, chunk=300).each([tokens])[0], wanted)


def test_ragged_turns_equal_rows_alone() -> None:
    rows = [text(64, seed=seed) for seed in range(4)]
    cuts = [(0, 30, 31, 50), (5, 5, 40, 41), (17, 17, 17, 17), (0, 9, 21, 63)]
    session = open_session(model(), MIXED, capacity=64, batch=4, chunk=8)
    for turn in range(4):
        fed = [row[(0, *cut)[turn] : cut[turn]] for row, cut in zip(rows, cuts, strict=True)]
        last = session.last(fed)
        for b, (row, part) in enumerate(zip(rows, fed, strict=True)):
            if part:
                close(last[b], oracle_logits(model(), row[: cuts[b][turn]], MIXED, 64)[-1:])
            else:
                assert last[b].shape == (0, VOCAB)
    assert session.lengths == [50, 41, 17, 63]
    after = [row[count] for row, count in zip(rows, session.lengths, strict=True)]
    step = session.decode(after)
    for b, (row, count) in enumerate(zip(rows, (51, 42, 18, 64), strict=True)):
        close(step[b], oracle_logits(model(), row[:count], MIXED, 64)[-1])


@pytest.mark.parametrize("most", [0, steps.JOINED_BYTES])
def test_rows_that_see_as_much_share_a_call_and_what_they_see_does_not_change(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [text(count, seed) for seed, count in enumerate((20, 40, 50, 40))]
    alone = [open_session(model(), MIXED, capacity=64).by_decode([row])[0][-1] for row in rows]
    session = open_session(model(), MIXED, capacity=64, batch=len(rows))
    session.each([row[:-1] for row in rows])
    monkeypatch.setattr(steps, "JOINED_BYTES", most)
    calls: list[int] = []
    attend = steps.decode_attention
    monkeypatch.setattr(
        steps, "decode_attention", lambda q, *rest: calls.append(len(q)) or attend(q, *rest)
    )
    found = session.each([[row[-1]] for row in rows])
    for own, wanted in zip(found, alone, strict=True):
        close(own[-1], wanted)
    # spans of 16 and 8 are full in all rows, 32 in all but the first, 64 alike where lengths are
    assert sorted(calls) == ([1, 1, 1, 2, 3, 4, 4] if most else [1] * len(rows) * 4)


def test_chosen_logits_are_those_of_the_whole() -> None:
    tokens = text(40)
    whole = open_session(model(), MIXED, capacity=64).each([tokens])[0]
    session = open_session(model(), MIXED, capacity=64, batch=2, chunk=16)
    chosen, none = session.feed([tokens, tokens], [[0, 15, 16, 39], []])
    close(chosen, whole[[0, 15, 16, 39]])
    assert none.shape == (0, VOCAB)


@pytest.mark.parametrize("windows", [(24, 24), (24, None), (5, 24)])
def test_own_sliding_windows_equal_the_oracle(windows: tuple[int | None, int | None]) -> None:
    # a window alone, a span whose sinks go out of the window, a window under min_span
    plan = plan_of((DENSE, Rule(16, 0.0)), (Rule(0, 0.25), DENSE), windows=windows)
    tokens = text(64)
    wanted = oracle_logits(model("mistral"), tokens, plan, 64)
    close(open_session(model("mistral"), plan, capacity=64).each([tokens])[0], wanted)
    chunked = open_session(model("mistral"), plan, capacity=64, chunk=7)
    close(chunked.each([tokens])[0], wanted)
    rows = [tokens[:40], tokens[:40]]
    session = open_session(model("mistral"), plan, capacity=64, batch=2)
    session.last([tokens[:8], tokens[:8]])
    close(session.by_decode([row[8:] for row in rows])[1], wanted[8:40])


def test_the_checkpoints_own_window_is_its_own_mask() -> None:
    built = tiny_model("mistral", sliding_window=24)
    plan, tokens = plan_of((DENSE, DENSE), (DENSE, DENSE), windows=(24, 24)), text(64)
    built.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = built(torch.tensor([tokens]), use_cache=False).logits[0]
    close(open_session(built, plan, capacity=64).each([tokens])[0], wanted)
    assert open_session(built, plan, capacity=64).kv_bytes() == 2 * 2 * 24 * 2 * 16 * 4


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_as_the_librarys_own(dtype: torch.dtype, family: str) -> None:
    exact, tokens = tiny_model(family), text(64)
    rounded = tiny_model(family).to(dtype)
    exact.load_state_dict(rounded.state_dict())
    wanted = oracle_logits(exact, tokens, MIXED, 64)
    # the same weights and roundings in transformers, but for attention, which is exact there
    budget = 1.5 * (oracle_logits(rounded, tokens, MIXED, 64) - wanted).norm()
    prefill = open_session(rounded, MIXED, capacity=64, dtype=dtype).each([tokens])[0]
    decode = open_session(rounded, MIXED, capacity=64, dtype=dtype).by_decode([tokens])[0]
    for found in (prefill, decode):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < budget


@pytest.mark.parametrize("capacity", [1, 8, 9, 40, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocated_bytes_are_the_plans(capacity: int, dtype: torch.dtype) -> None:
    session = open_session(model(), MIXED, capacity=capacity, batch=3, dtype=dtype)
    token_bytes = packed(model(), MIXED)[0].spec.kv_token_bytes(dtype.itemsize)
    assert session.kv_bytes() == MIXED.held_tokens(capacity) * token_bytes * 3
    assert session.session.kv_bytes(session.rows[1]) == MIXED.held_tokens(capacity) * token_bytes
    session.last([text(min(capacity, 30)), text(capacity), []])
    session.keep([1])
    assert session.kv_bytes() == MIXED.held_tokens(capacity) * token_bytes
    session.grow(2 * capacity)
    assert session.kv_bytes() == MIXED.held_tokens(2 * capacity) * token_bytes


def test_steps_allocate_no_cache() -> None:
    session = open_session(model(), MIXED, capacity=64)
    row: Any = session.session._row(session.rows[0])  # type: ignore[attr-defined]
    caches = [cache for layer in row.layers for cache in layer]
    parts = [part for cache in caches for part in (*cache.keys, *cache.values)]
    before = [part.data_ptr() for part in parts]
    session.last([text(50)])
    session.decode([1])
    after = [part for cache in caches for part in (*cache.keys, *cache.values)]
    assert [part.data_ptr() for part in after] == before


def test_growth_without_loss_equals_the_larger_session() -> None:
    # at 24 tokens all heads hold everything; at 96 they part into spans 48, 96 / 24, 48
    plan = plan_of((Rule(24, 0.25), DENSE), (Rule(24, 0.0), Rule(24, 0.25)))
    tokens = text(96)
    wanted = oracle_logits(model(), tokens, plan, 96)
    for chunk in (5, 512):
        session = open_session(model(), plan, capacity=24, chunk=chunk)
        session.last([tokens[:24]])
        session.grow(96)
        assert session.session.capacity(session.rows[0]) == 96
        found = session.each([tokens[24:60]])[0]
        close(torch.cat([found, session.by_decode([tokens[60:]])[0]]), wanted[24:])


GROWING = [
    ("llama", MIXED),
    # no window at 40 tokens, a window of 48 that binds at 80, and a head that is all window at 120
    ("mistral", plan_of((Rule(0, 0.5), DENSE), (Rule(0, 0.25), DENSE), windows=(48, 48))),
]


@pytest.mark.parametrize(("family", "plan"), GROWING)
def test_growth_after_loss_drops_nothing_else(family: str, plan: Plan) -> None:
    rows = [text(120, seed=seed) for seed in range(3)]
    fed = [(40, 57, 117), (40, 40, 100), (17, 30, 90)]
    wanted = []
    for row, stops in zip(rows, fed, strict=True):
        phases = list(zip((40, 80, 120), stops, strict=True))
        masks = [grown_masks(plan, layer, phases) for layer in (0, 1)]
        wanted.append(masked_logits(model(family), row[: stops[-1]], masks)[stops[1] :])

    def grown() -> Batch:
        session = open_session(model(family), plan, capacity=40, batch=3, chunk=16)
        session.last([row[:a] for row, (a, _, _) in zip(rows, fed, strict=True)])
        session.grow(80)
        session.last([row[a:b] for row, (a, b, _) in zip(rows, fed, strict=True)])
        session.grow(120)
        return session

    rest = [row[b:c] for row, (_, b, c) in zip(rows, fed, strict=True)]
    close(torch.stack(grown().each(rest)), torch.stack(wanted))
    close(grown().by_decode(rest), torch.stack(wanted))
    # and what was dropped stayed dropped
    fresh = oracle_logits(model(family), rows[0][:117], plan, 120)[57:]
    assert (wanted[0] - fresh)[:8].abs().amax(-1).min() > 10 * ATOL


def test_kept_rows_go_on_as_before() -> None:
    rows = [text(50, seed=seed) for seed in range(3)]
    session = open_session(model(), MIXED, capacity=64, batch=3)
    session.last([rows[0][:30], rows[1][:7], rows[2][:45]])
    session.keep([2, 1])
    assert len(session.session.rows) == 2
    assert session.lengths == [45, 7]
    found = session.decode([rows[2][45], rows[1][7]])
    close(found[0], oracle_logits(model(), rows[2][:46], MIXED, 64)[-1])
    close(found[1], oracle_logits(model(), rows[1][:8], MIXED, 64)[-1])


def test_a_full_session_takes_no_more_and_loses_nothing() -> None:
    tokens = text(32)
    session = open_session(model(), MIXED, capacity=32, batch=2)
    session.last([tokens[:31], tokens[:3]])
    with pytest.raises(MoacError, match="row 0 holds 31 of 32 tokens and cannot take 2 more"):
        session.last([tokens[:2], tokens[:1]])
    assert session.lengths == [31, 3]
    session.decode([tokens[31], tokens[3]])
    with pytest.raises(MoacError, match="row 0 holds 32 of 32 tokens and cannot take 1 more"):
        session.decode([1, 1])


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        *WRONG_FEEDS,
        (lambda s: s.grow(0, 16), "cannot grow a row of 16 tokens to 16; give a larger capacity"),
        (lambda s: s.grow(2, 32), "the session has no row 2; name one that was admitted"),
        (lambda s: s.release(2), "the session has no row 2"),
        (lambda s: s.snapshot(2), "the session has no row 2"),
        (lambda s: s.length(2), "the session has no row 2"),
        (lambda s: s.kv_bytes(2), "the session has no row 2"),
    ],
)
def test_wrong_requests_are_one_sentence(ask: Any, sentence: str) -> None:
    session = open_session(model(), MIXED, capacity=16, batch=2)
    with pytest.raises(UsageError, match=sentence):
        ask(session.session)
    assert session.lengths == [0, 0]
    assert session.session.rows == (0, 1)


@pytest.mark.parametrize("name", ["capacity", "chunk"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0, expected at least 1"):
        open_session(model(), MIXED, **{"capacity": 8, name: 0})


def test_weights_that_do_not_fit_are_refused() -> None:
    decoder, _ = packed(model(), MIXED)
    with pytest.raises(ArtifactError, match=r"embed\.weight is missing"):
        Decoder(decoder.spec, {}, dtype=torch.float32)
    with pytest.raises(ArtifactError, match=r"has shape \[2, 3\], but .* \[320, 64\]"):
        Decoder(decoder.spec, {"embed.weight": torch.zeros(2, 3)}, dtype=torch.float32)


def test_the_dense_plan_drops_nothing() -> None:
    plan = dense_plan(2, 2, sink=SINK, block=BLOCK, min_span=MIN_SPAN, windows=(None, None))
    tokens = text(48)
    model_ = tiny_model("qwen3")
    model_.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model_(torch.tensor([tokens]), use_cache=False).logits[0]
    close(open_session(model_, plan, capacity=48).each([tokens])[0], wanted)
