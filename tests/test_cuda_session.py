"""The cuda backend's sessions, kernels interpreted on CPU tensors, against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import WRONG_FEEDS, Batch
from families import FAMILIES, MIXTURES, VOCAB, tiny_model
from interpreted_cuda import interpreter, open_session, session_of
from oracle import grown_masks, masked_logits, oracle_logits
from oracle import open_session as open_torch_session
from plans import MIXED, plan_of, text
from torch import Tensor

from moac.checkpoint.families import model_spec
from moac.packaging.fuse import head_order
from moac_runtime.backends.cuda import decode as decode_module
from moac_runtime.backends.cuda import session as session_module
from moac_runtime.backends.cuda.decode import bucket
from moac_runtime.backends.cuda.session import CudaSession
from moac_runtime.backends.feeding import by_feed
from moac_runtime.backends.session import Feed
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule
from moac_runtime.package.weights import expected_tensors

ATOL = 2e-4

Run = Callable[..., Any]


# at 48 tokens: spans 16, 48; a second layer with 8 (the least), 24
ONE = plan_of((Rule(0, 0.25), DENSE))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    yield from interpreter()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=ATOL)


# own windows that 25 tokens pass
WINDOWS = dict.fromkeys(("gemma2", "gemma3_text", "cohere2"), 20)
SERVED = [name for name in FAMILIES if name not in MIXTURES]
ONE_KIND = ("mistral", "qwen2", "qwen3", "granite", "phi3", "stablelm")


def family(name: str, rope: str = "default") -> None:
    """Chunked prefill past the smallest spans, then decode while rings wrap."""
    plan, tokens = (ONE if name in ONE_KIND else MIXED), text(25)
    own = {"sliding_window": WINDOWS[name]} if name in WINDOWS else {}
    model = tiny_model(name, rope=rope, num_hidden_layers=len(plan.rules), **own)
    plan = replace(plan, windows=model_spec(model.config).windows)
    assert any(plan.windows) == (name in WINDOWS)
    wanted = oracle_logits(model, tokens, plan, 48)
    session = open_session(model, plan, capacity=48, chunk=17)
    prefill = session.each([tokens[:21]])[0]
    decode = session.by_decode([tokens[21:]])[0]
    close(torch.cat([prefill, decode]), wanted)
    torch_session = open_torch_session(model, plan, capacity=48)
    close(prefill, torch_session.each([tokens[:21]])[0])
    assert session.kv_bytes() == torch_session.kv_bytes()


# the others are refused before any work (test_kernels_package.py)
@pytest.mark.parametrize("name", SERVED)
def test_every_family_equals_the_oracle(interpreted: Run, name: str) -> None:
    interpreted(family, name)


# a factor on cos and sin of what rotates, which for phi3 is a part of each head
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_scaled_rotation_equals_the_oracle(interpreted: Run, name: str) -> None:
    interpreted(family, name, "longrope")


def by_both(changes: dict[str, Any]) -> None:
    """A model of options that no family here has, against the torch backend."""
    spec = model_spec(tiny_model("llama", num_hidden_layers=1).config)
    spec = replace(spec, kinds=(replace(spec.kinds[0], **changes),))
    torch.manual_seed(1)
    weights = {name: torch.randn(shape) for name, shape in expected_tensors(spec).items()}
    order, tokens = head_order(ONE), text(25)
    sessions = (
        Batch(session_of(spec, weights, ONE, chunk=17), batch=1, capacity=48),
        Batch(TorchSession(Decoder(spec, weights), ONE, order), batch=1, capacity=48),
    )
    found, wanted = (
        torch.cat([batch.each([tokens[:21]])[0], batch.by_decode([tokens[21:]])[0]])
        for batch in sessions
    )
    # logits of hundreds, as weights are
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("changes", [{"sink_logits": True}, {"o_bias": True, "mlp_bias": True}])
def test_other_options_equal_the_torch_backend(interpreted: Run, changes: dict[str, Any]) -> None:
    interpreted(by_both, changes)


def ragged() -> None:
    """Rows of different lengths, turns, a row that gets nothing, rings that wrap."""
    model = tiny_model("llama", num_hidden_layers=1)
    rows = [text(64, seed=seed) for seed in range(3)]
    session = open_session(model, ONE, capacity=64, batch=3, chunk=24)
    cuts = [(0, 19, 20), (5, 5, 25), (13, 13, 13)]
    for turn in range(3):
        fed = [row[(0, *cut)[turn] : cut[turn]] for row, cut in zip(rows, cuts, strict=True)]
        last = session.last(fed)
        for b, (row, part) in enumerate(zip(rows, fed, strict=True)):
            if part:
                close(last[b], oracle_logits(model, row[: cuts[b][turn]], ONE, 64)[-1:])
            else:
                assert last[b].shape == (0, VOCAB)
    found = session.by_decode(
        [row[count : count + 3] for row, count in zip(rows, session.lengths, strict=True)]
    )
    assert session.lengths == [23, 28, 16]
    for b, row in enumerate(rows):
        count = session.lengths[b]
        close(found[b], oracle_logits(model, row[:count], ONE, 64)[-3:])


def test_ragged_turns_equal_rows_alone(interpreted: Run) -> None:
    interpreted(ragged)


def leaving() -> None:
    """Rows leave and are fed in another order; what stays goes on as it would alone."""
    model = tiny_model("llama", num_hidden_layers=1)
    rows = [text(40, seed=seed) for seed in range(4)]
    batch = open_session(model, ONE, capacity=64, batch=4)
    session = batch.session
    batch.last([row[: 10 + 5 * i] for i, row in enumerate(rows)])
    held = session.kv_bytes()
    assert held == sum(map(session.kv_bytes, session.rows))
    batch.decode([row[10 + 5 * i] for i, row in enumerate(rows)])
    batch.keep([3, 0, 1])
    assert batch.lengths == [26, 11, 16]
    assert session.kv_bytes() == held
    found = batch.decode([rows[3][26], rows[0][11], rows[1][16]])
    for logits, (b, count) in zip(found, ((3, 27), (0, 12), (1, 17)), strict=True):
        close(logits, oracle_logits(model, rows[b][:count], ONE, 64)[-1])
    # a step of some rows alone, then all of them again
    first, second = batch.rows[1:]
    close(
        session.step([Feed(second, [rows[1][17]]), Feed(first, [rows[0][12]], ())]),
        oracle_logits(model, rows[1][:18], ONE, 64)[-1:],
    )
    chosen, none, one = batch.feed([rows[3][27:34], [], [rows[1][18]]], [[0, 6], [], None])
    close(chosen, oracle_logits(model, rows[3][:34], ONE, 64)[[27, 33]])
    close(one, oracle_logits(model, rows[1][:19], ONE, 64)[-1:])
    assert none.shape == (0, VOCAB)
    assert batch.lengths == [34, 13, 19]
    for row in batch.rows:
        session.release(row)
    assert session.kv_bytes() == 0
    # with its last row the batch is over, and another may begin
    close(Batch(session, batch=1, capacity=48).last([rows[0][:9]])[0],
          oracle_logits(model, rows[0][:9], ONE, 48)[-1:])  # fmt: skip


def test_kept_rows_go_on_as_before(interpreted: Run) -> None:
    interpreted(leaving)


def restoring() -> None:
    """A row is restored, twice, into a batch that has not begun; wrapped rings and lost tokens."""
    model, tokens = tiny_model("llama", num_hidden_layers=1), text(60)
    begun = open_session(model, ONE, capacity=40)
    begun.last([tokens[:30]])
    begun.grow(64)
    begun.last([tokens[30:34]])
    taken = begun.session.snapshot(begun.rows[0])
    assert taken.bytes <= begun.session.kv_bytes()
    late = "the batch has begun, and this backend takes no row after the first step"
    for ask in (lambda: begun.session.admit(64), lambda: begun.session.restore(taken)):
        with pytest.raises(UsageError, match=late):
            ask()
    other = open_session(model, ONE, capacity=64)
    with pytest.raises(UsageError, match="the snapshot is of another model, plan or backend"):
        other.session.restore(taken)
    session = CudaSession(*begun.session._origin, begun.session._tables)  # type: ignore[attr-defined]
    rows = [session.admit(64), session.restore(taken), session.restore(taken)]
    with pytest.raises(UsageError, match="a row of 65 tokens cannot join a batch of rows of 64"):
        session.admit(65)
    assert list(map(session.length, rows)) == [0, 34, 34]
    wanted = torch.cat(begun.each([tokens[34:40]]))
    feeds = [Feed(rows[0], tokens[:6]), *(Feed(row, tokens[34:40], range(6)) for row in rows[1:])]
    fresh, first, second = by_feed(session.step(feeds), feeds)
    close(fresh, oracle_logits(model, tokens[:6], ONE, 64)[-1:])
    close(first, wanted)
    close(second, wanted)


def test_a_restored_row_continues_and_a_late_one_is_refused(interpreted: Run) -> None:
    interpreted(restoring)


GROWING: dict[str, tuple[Plan, dict[str, Any]]] = {
    "llama": (ONE, {}),
    # no window at 40 tokens, and one of 48 that binds at 80
    "mistral": (plan_of((Rule(0, 0.5), DENSE), windows=(48,)), {"sliding_window": 48}),
}


def growing(name: str) -> None:
    plan, options = GROWING[name]
    model = tiny_model(name, num_hidden_layers=1, **options)
    rows, fed = [text(80, seed=seed) for seed in range(2)], [(40, 46, 48), (17, 19, 21)]
    session = open_session(model, plan, capacity=40, batch=2, chunk=30)
    session.last([row[:a] for row, (a, _, _) in zip(rows, fed, strict=True)])
    session.grow(80)
    found = session.each([row[a:b] for row, (a, b, _) in zip(rows, fed, strict=True)])
    decoded = session.by_decode([row[b:c] for row, (_, b, c) in zip(rows, fed, strict=True)])
    for b, (row, stops) in enumerate(zip(rows, fed, strict=True)):
        phases = [(40, stops[0]), (80, stops[2])]
        wanted = masked_logits(model, row[: stops[2]], [grown_masks(plan, 0, phases)])
        wanted = wanted[stops[0] :]
        close(torch.cat([found[b], decoded[b]]), wanted)


@pytest.mark.parametrize("name", GROWING)
def test_growth_drops_nothing_else(interpreted: Run, name: str) -> None:
    interpreted(growing, name)


def long_decode() -> None:
    """Past the steps that one work table serves."""
    model, tokens = tiny_model("llama", num_hidden_layers=1), text(12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "LOOKAHEAD", 3)
        session = open_session(model, ONE, capacity=64)
        session.last([tokens[:4]])
        close(session.by_decode([tokens[4:]])[0], oracle_logits(model, tokens, ONE, 64)[4:])


def test_a_work_table_is_made_anew_when_it_is_used_up(interpreted: Run) -> None:
    interpreted(long_decode)


def requests() -> None:
    """Wrong requests are refused before anything is fed."""
    model = tiny_model("llama", num_hidden_layers=1)
    batch = open_session(model, plan_of((DENSE, DENSE)), capacity=16, batch=2)
    wrong: list[tuple[Callable[[Any], Any], str]] = [
        *WRONG_FEEDS,
        (lambda s: s.grow(0, 16), "cannot grow a row of 16 tokens to 16"),
        (lambda s: s.release(2), "the session has no row 2"),
        (lambda s: s.step([Feed(0, [1] * 17)]), "row 0 holds 0 of 16 tokens and cannot take 17"),
    ]
    for ask, sentence in wrong:
        with pytest.raises(MoacError, match=sentence):
            ask(batch.session)
    assert batch.lengths == [0, 0]


def test_wrong_requests_are_one_sentence(interpreted: Run) -> None:
    interpreted(requests)


def does_not_fit() -> None:
    model, plan = tiny_model("llama", num_hidden_layers=1), plan_of((DENSE, DENSE))
    sentence = "a batch of 1 rows of 1048576 tokens needs .* GiB, 0.3 free: not even one row fits;"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "free_bytes", lambda device: 300 * 2**20)
        batch = open_session(model, plan, capacity=64)
        batch.last([[1, 2]])
        with pytest.raises(MoacError, match=sentence):
            batch.grow(1 << 20)
        assert batch.session.capacity(batch.rows[0]) == 64
        batch.decode([3])
        with pytest.raises(
            MoacError, match=r"a batch of \d+ rows of 64 tokens .*: batch \d+ fits"
        ):
            open_session(model, plan, capacity=64, batch=40000)
        with pytest.raises(MoacError, match=sentence):
            open_session(model, plan, capacity=1 << 20)


def test_a_session_that_does_not_fit_is_one_sentence(interpreted: Run) -> None:
    interpreted(does_not_fit)


def test_buckets_are_powers_of_two_and_the_whole() -> None:
    assert [bucket(rows, 11) for rows in (1, 2, 3, 5, 8, 9, 11)] == [1, 2, 4, 8, 8, 11, 11]


def test_a_chunk_below_one_is_refused() -> None:
    none: Any = None
    with pytest.raises(UsageError, match="chunk is 0, expected at least 1"):
        CudaSession(none, MIXED, (), none, chunk=0)
