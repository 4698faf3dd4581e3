"""Native CPU sessions against transformers' own models under the dense reference attention."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from batches import WRONG_FEEDS, Batch
from cpu_kernels import needs_compiler, open_cpu_session
from families import FAMILIES, ROPES, VOCAB, tiny_model
from oracle import grown_masks, masked_logits, open_session, oracle_logits
from plans import BLOCK, MIN_SPAN, MIXED, plan_of, text
from torch import Tensor
from transformers import PreTrainedModel

from moac_runtime.backends.cpu.engine import obstacle
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule

pytestmark = needs_compiler

ATOL = 2e-4


@cache
def model(family: str = "llama", **options: Any) -> PreTrainedModel:
    return tiny_model(family, **options)


def close(found: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=0, atol=ATOL)


def fed(session: Batch, tokens: list[int]) -> Tensor:
    return session.each([tokens])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_transformers(kernels: str, family: str) -> None:
    tokens = text(64)
    wanted = oracle_logits(model(family), tokens, MIXED, 64)
    open_one = partial(open_cpu_session, model(family), MIXED, instruction_set=kernels)
    close(fed(open_one(capacity=64), tokens), wanted)
    close(open_one(capacity=64).by_decode([tokens])[0], wanted)


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_equals_transformers(kernels: str, rope: str) -> None:
    tokens = text(96)
    wanted = oracle_logits(model(rope=rope), tokens, MIXED, 96)
    open_one = partial(open_cpu_session, model(rope=rope), MIXED, instruction_set=kernels)
    close(fed(open_one(capacity=96), tokens), wanted)
    close(open_one(capacity=96).by_decode([tokens])[0], wanted)


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
def test_options_equal_transformers(kernels: str, options: dict[str, Any]) -> None:
    built, tokens = tiny_model("llama", **options), text(40)
    wanted = oracle_logits(built, tokens, MIXED, 64)
    open_one = partial(open_cpu_session, built, MIXED, instruction_set=kernels, capacity=64)
    close(fed(open_one(), tokens), wanted)
    close(open_one().by_decode([tokens])[0], wanted)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_groups_and_head_dims_equal_transformers(kernels: str, group: int, head_dim: int) -> None:
    built = tiny_model("llama", head_dim=head_dim, hidden_size=48, num_attention_heads=2 * group)
    rows = [text(40, seed=1), text(29, seed=2)]
    session = open_cpu_session(
        built, MIXED, instruction_set=kernels, capacity=64, batch=2, chunk=19
    )
    prefill = session.each([row[:-8] for row in rows])
    decode = session.by_decode([row[-8:] for row in rows])
    for row, head, tail in zip(rows, prefill, decode, strict=True):
        found = torch.cat([torch.as_tensor(head), tail])
        close(found, oracle_logits(built, row, MIXED, 64))


@pytest.mark.parametrize("span", range(MIN_SPAN, 49, BLOCK))
def test_every_span_equals_the_oracle_and_differs_from_dense(kernels: str, span: int) -> None:
    rule = Rule(span, 0.0)
    plan, tokens = plan_of((rule, rule), (rule, rule)), text(48)
    wanted = oracle_logits(model(), tokens, plan, 48)
    session = open_cpu_session(model(), plan, instruction_set=kernels, capacity=48)
    found = torch.cat([fed(session, tokens[:20]), session.by_decode([tokens[20:]])[0]])
    close(found, wanted)
    dense = oracle_logits(model(), tokens, plan_of((DENSE, DENSE), (DENSE, DENSE)), 48)
    close(found[:span], dense[:span])
    if span < 48:
        # from here on every row lacks a key that dense attention sees
        assert (found[span:] - dense[span:]).abs().amax(-1).min() > 10 * ATOL


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 63])
def test_chunked_prefill_equals_whole(kernels: str, chunk: int) -> None:
    tokens = text(64)
    open_one = partial(open_cpu_session, model(), MIXED, instruction_set=kernels, capacity=64)
    close(fed(open_one(chunk=chunk), tokens), fed(open_one(), tokens))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_long_rows_of_several_tiles_and_items_equal_the_oracle(kernels: str, threads: int) -> None:
    tokens = text(900)
    plan = plan_of((Rule(0, 0.125), DENSE), (Rule(-8, 0.0625), Rule(0, 0.5)))
    wanted = oracle_logits(model(), tokens, plan, 900)
    session = open_cpu_session(
        model(), plan, instruction_set=kernels, capacity=900, chunk=300, threads=threads
    )
    found = torch.cat([fed(session, tokens[:890]), session.by_decode([tokens[890:]])[0]])
    close(found, wanted)


def test_ragged_turns_equal_rows_alone(kernels: str) -> None:
    rows = [text(64, seed=seed) for seed in range(4)]
    cuts = [(0, 30, 31, 50), (5, 5, 40, 41), (17, 17, 17, 17), (0, 9, 21, 63)]
    session = open_cpu_session(
        model(), MIXED, instruction_set=kernels, capacity=64, batch=4, chunk=11
    )
    for turn in range(4):
        parts = [row[(0, *cut)[turn] : cut[turn]] for row, cut in zip(rows, cuts, strict=True)]
        last = session.last(parts)
        for b, (row, part) in enumerate(zip(rows, parts, strict=True)):
            if part:
                close(last[b], oracle_logits(model(), row[: cuts[b][turn]], MIXED, 64)[-1:])
            else:
                assert last[b].shape == (0, VOCAB)
    assert session.lengths == [50, 41, 17, 63]
    session.keep([2, 1])
    step = torch.as_tensor(session.decode([rows[2][17], rows[1][41]]))
    close(step[0], oracle_logits(model(), rows[2][:18], MIXED, 64)[-1])
    close(step[1], oracle_logits(model(), rows[1][:42], MIXED, 64)[-1])


def test_chosen_logits_are_those_of_the_whole(kernels: str) -> None:
    tokens = text(40)
    open_one = partial(open_cpu_session, model(), MIXED, instruction_set=kernels, capacity=64)
    whole = fed(open_one(), tokens)
    chosen, none = open_one(batch=2, chunk=16).feed([tokens, tokens], [[0, 15, 16, 39], []])
    close(chosen, whole[[0, 15, 16, 39]])
    assert none.shape == (0, VOCAB)


@pytest.mark.parametrize("windows", [(24, 24), (24, None), (5, 24)])
def test_own_sliding_windows_equal_the_oracle(
    kernels: str, windows: tuple[int | None, int | None]
) -> None:
    # a window alone, a span whose sinks go out of the window, a window under min_span
    plan = plan_of((DENSE, Rule(16, 0.0)), (Rule(0, 0.25), DENSE), windows=windows)
    tokens = text(64)
    wanted = oracle_logits(model("mistral"), tokens, plan, 64)
    open_one = partial(
        open_cpu_session, model("mistral"), plan, instruction_set=kernels, capacity=64
    )
    close(fed(open_one(), tokens), wanted)
    close(fed(open_one(chunk=7), tokens), wanted)
    close(open_one().by_decode([tokens])[0], wanted)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text"])
def test_bfloat16_is_as_near_as_the_librarys_own(kernels: str, family: str) -> None:
    exact, tokens = tiny_model(family), text(64)
    rounded = tiny_model(family).to(torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    wanted = oracle_logits(exact, tokens, MIXED, 64)
    # the same weights and roundings in transformers, but for attention, which is exact there
    budget = 1.5 * (oracle_logits(rounded, tokens, MIXED, 64) - wanted).norm()
    open_one = partial(
        open_cpu_session, rounded, MIXED, instruction_set=kernels, capacity=64,
        dtype=torch.bfloat16,
    )  # fmt: skip
    for found in (fed(open_one(), tokens), open_one().by_decode([tokens])[0]):
        assert (found - wanted).norm() < budget


@pytest.mark.parametrize("capacity", [1, 8, 9, 40, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocated_bytes_are_the_plans(kernels: str, capacity: int, dtype: torch.dtype) -> None:
    session = open_cpu_session(
        model(), MIXED, instruction_set=kernels, capacity=capacity, batch=3, dtype=dtype
    )
    native: Any = session.session
    token = native._engine.spec.kv_token_bytes(dtype.itemsize)

    def allocated() -> int:
        return sum(len(native._row(row).memory) for row in native.rows)

    assert session.kv_bytes() == MIXED.held_tokens(capacity) * token * 3 == allocated()
    assert native.kv_bytes(session.rows[1]) == MIXED.held_tokens(capacity) * token
    session.last([text(min(capacity, 30)), text(capacity), []])
    session.keep([1])
    assert session.kv_bytes() == MIXED.held_tokens(capacity) * token == allocated()
    session.grow(2 * capacity)
    assert session.kv_bytes() == MIXED.held_tokens(2 * capacity) * token == allocated()


GROWING = [
    ("llama", MIXED),
    # no window at 40 tokens, a window of 48 that binds at 80, and a head that is all window at 120
    ("mistral", plan_of((Rule(0, 0.5), DENSE), (Rule(0, 0.25), DENSE), windows=(48, 48))),
]


@pytest.mark.parametrize(("family", "plan"), GROWING)
def test_growth_after_loss_drops_nothing_else(kernels: str, family: str, plan: Plan) -> None:
    rows = [text(120, seed=seed) for seed in range(3)]
    stops = [(40, 57, 117), (40, 40, 100), (17, 30, 90)]
    wanted = []
    for row, ends in zip(rows, stops, strict=True):
        phases = list(zip((40, 80, 120), ends, strict=True))
        masks = [grown_masks(plan, layer, phases) for layer in (0, 1)]
        wanted.append(masked_logits(model(family), row[: ends[-1]], masks)[ends[1] :])

    def grown() -> Batch:
        session = open_cpu_session(
            model(family), plan, instruction_set=kernels, capacity=40, batch=3, chunk=16
        )
        session.last([row[:a] for row, (a, _, _) in zip(rows, stops, strict=True)])
        session.grow(80)
        session.last([row[a:b] for row, (a, b, _) in zip(rows, stops, strict=True)])
        session.grow(120)
        return session

    rest = [row[b:c] for row, (_, b, c) in zip(rows, stops, strict=True)]
    for found, expected in zip(grown().each(rest), wanted, strict=True):
        close(found, expected)
    close(grown().by_decode(rest), torch.stack(wanted))


def test_long_turns_equal_the_torch_backend(kernels: str) -> None:
    built, tokens = tiny_model("qwen3"), text(480)
    torch_session = open_session(built, MIXED, capacity=480)
    native = open_cpu_session(built, MIXED, instruction_set=kernels, capacity=480, threads=2)
    close(fed(native, tokens[:450]), torch_session.each([tokens[:450]])[0])
    for token in tokens[450:]:
        close(native.decode([token]), torch_session.decode([token]))


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        *WRONG_FEEDS,
        (lambda s: s.grow(0, 16), "cannot grow a row of 16 tokens to 16"),
        (lambda s: s.release(2), "the session has no row 2"),
    ],
)
def test_wrong_requests_are_one_sentence(kernels: str, ask: Any, sentence: str) -> None:
    session = open_cpu_session(model(), MIXED, instruction_set=kernels, capacity=16, batch=2)
    with pytest.raises(UsageError, match=sentence):
        ask(session.session)
    assert session.lengths == [0, 0]


def test_a_full_session_takes_no_more_and_loses_nothing(kernels: str) -> None:
    tokens = text(32)
    session = open_cpu_session(model(), MIXED, instruction_set=kernels, capacity=32, batch=2)
    session.last([tokens[:31], tokens[:3]])
    with pytest.raises(MoacError, match="row 0 holds 31 of 32 tokens and cannot take 2 more"):
        session.last([tokens[:2], tokens[:1]])
    found = torch.as_tensor(session.decode([tokens[31], tokens[3]]))
    close(found[0], oracle_logits(model(), tokens, MIXED, 32)[-1])


def test_what_the_kernels_do_not_serve_has_its_sentence() -> None:
    from moac.checkpoint.families import model_spec

    spec = model_spec(model().config)
    assert obstacle(spec, "bfloat16") is None
    assert "not in float16" in str(obstacle(spec, "float16"))
    odd = model_spec(tiny_model("llama", hidden_size=56, head_dim=16).config)
    assert "hidden_size that is a multiple of 16" in str(obstacle(odd, "float32"))
