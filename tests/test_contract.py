"""The session contract on the backends whose rows come and go: cpu (native kernels) and torch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import Batch
from cpu_kernels import library, needs_compiler, open_cpu_session
from families import tiny_model
from oracle import open_session, oracle_logits, packed
from plans import MIXED, plan_of, text
from torch import Tensor

from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.library import CACHE_INT4, CACHE_INT8, CACHE_PLAIN
from moac_runtime.backends.feeding import by_feed, cut, num_wanted
from moac_runtime.backends.session import Feed, Session
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE

ATOL = 2e-4

Open = Callable[..., Session]


@pytest.fixture(params=[pytest.param("cpu", marks=needs_compiler), "torch"])
def open_empty(request: pytest.FixtureRequest) -> Open:
    """`open_empty(plan, family=..., rope=...)`: a session without rows on a tiny model."""

    def opened(
        plan: Plan = MIXED, *, chunk: int = 512, family: str = "llama", rope: str = "default"
    ) -> Session:
        model = tiny_model(family, rope=rope)
        options: dict[str, Any] = {"batch": 0, "capacity": 1, "chunk": chunk}
        if request.param == "torch":
            return open_session(model, plan, **options).session
        return open_cpu_session(model, plan, instruction_set="avx2", **options).session

    if request.param == "cpu":
        library("avx2")
    return opened


def close(found: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=0, atol=ATOL)


def planned(*capacities: int) -> int:
    """Bytes of rows of these capacities, in float32."""
    token = packed(tiny_model("llama"), MIXED)[0].spec.kv_token_bytes(4)
    return sum(MIXED.held_tokens(capacity) * token for capacity in capacities)


def greedy(session: Session, row: int, prompt: list[int], count: int) -> list[int]:
    """`count` tokens that a row answers a prompt with, by steps of its own."""
    tokens = [int(session.step([Feed(row, prompt)])[0].argmax())]
    while len(tokens) < count:
        tokens.append(int(session.step([Feed(row, tokens[-1:])])[0].argmax()))
    return tokens


def test_rows_come_and_go_while_others_decode(open_empty: Open) -> None:
    """One joins in the middle, prompt and all in a step of the others', and one leaves."""
    capacities, prompts = (64, 48, 80), [text(30, 1), text(9, 2), text(40, 3)]
    alone = []
    for capacity, prompt in zip(capacities, prompts, strict=True):
        session = open_empty()
        alone.append(greedy(session, session.admit(capacity), prompt, 24))

    session = open_empty(chunk=16)
    assert not session.fixed_batch
    assert (session.rows, session.kv_bytes()) == ((), 0)
    numbers = [session.admit(capacities[0]), session.admit(capacities[1])]
    assert session.kv_bytes() == planned(64, 48)
    said: dict[int, list[int]] = {row: [] for row in numbers}
    feeds = [Feed(*pair) for pair in zip(numbers, prompts, strict=False)]
    for step in range(30):
        for feed, logits in zip(feeds, session.step(feeds), strict=True):
            said[feed.row].append(int(logits.argmax()))
        feeds = [Feed(row, tokens[-1:]) for row, tokens in said.items() if row in session.rows]
        if step == 5:
            numbers.append(session.admit(capacities[2]))
            said[numbers[2]] = []
            feeds.insert(1, Feed(numbers[2], prompts[2]))
            assert session.kv_bytes() == planned(64, 48, 80)
        if step == 12:
            session.release(numbers[0])
            feeds = [feed for feed in feeds if feed.row != numbers[0]]
        present = [c for n, c in zip(numbers, capacities, strict=False) if n in session.rows]
        assert session.kv_bytes() == planned(*present)
        assert [session.kv_bytes(row) for row in session.rows] == [planned(c) for c in present]
    assert session.rows == tuple(numbers[1:])
    assert said[numbers[0]] == alone[0][:13]
    assert said[numbers[1]][:24] == alone[1]
    assert said[numbers[2]][:24] == alone[2]
    assert session.admit(8) not in numbers  # a number is never given again


@pytest.mark.parametrize(
    ("family", "windows"), [("llama", (None, None)), ("gemma3_text", (48, None))]
)
def test_rows_of_different_capacities_in_a_step_equal_each_alone(
    open_empty: Open, family: str, windows: tuple[int | None, ...]
) -> None:
    """Spans, and with dynamic RoPE frequencies too, follow from a row's own capacity.

    Of the two rotary tables of a Gemma the second alone is dynamic.
    """
    model, plan = tiny_model(family, rope="dynamic"), replace(MIXED, windows=windows)
    asked: Any = {"family": family, "rope": "dynamic"}
    session, capacities = open_empty(plan, chunk=24, **asked), (40, 64, 100, 300)
    rows = [session.admit(capacity) for capacity in capacities]
    texts = [text(capacity, seed=capacity) for capacity in capacities]
    # the library's frequencies follow from the tokens fed: as many as a row may hold
    wanted = [oracle_logits(model, tokens, plan, len(tokens)) for tokens in texts]
    cuts = (31, 5, 38, 17)
    feeds = [Feed(row, t[:n], range(n)) for row, t, n in zip(rows, texts, cuts, strict=True)]
    for found, expected, n in zip(by_feed(session.step(feeds), feeds), wanted, cuts, strict=True):
        close(found, expected[:n])
    for step in range(2):
        feeds = [Feed(r, [t[n + step]]) for r, t, n in zip(rows, texts, cuts, strict=True)]
        close(
            session.step(feeds),
            torch.stack([w[n + step] for w, n in zip(wanted, cuts, strict=True)]),
        )
    alone = open_empty(plan, **asked)
    other = alone.step([Feed(alone.admit(300), texts[2][:38])])
    assert (torch.as_tensor(other)[0] - wanted[2][37]).abs().max() > 10 * ATOL


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("length", [0, 3, 41])  # nothing, within the sinks, with rings wrapped
def test_a_restored_row_continues_token_for_token(
    open_empty: Open, length: int, grown: bool
) -> None:
    session, tokens = open_empty(), text(90)
    row = session.admit(48)
    if length:
        session.step([Feed(row, tokens[:length])])
    if grown:
        session.grow(row, 96)
    taken = session.snapshot(row)
    assert taken.bytes <= session.kv_bytes(row)
    assert (taken.bytes == 0) == (length == 0)
    rest = tokens[length : session.capacity(row)]

    def continued(on: Session, number: int) -> list[Tensor]:
        many = on.step([Feed(number, rest[:4], range(4))])
        steps = [on.step([Feed(number, [token])]) for token in rest[4:]]
        return [torch.as_tensor(part).clone() for part in (many, *steps)]

    wanted = continued(session, row)  # the row itself goes on, and the snapshot does not change
    session.release(row)
    other = Batch(session, batch=1, capacity=30).session  # beside a row that is not fed
    for _ in range(2):
        copy = other.restore(taken)
        assert other.length(copy) == length
        assert other.capacity(copy) == (96 if grown else 48)
        for found, expected in zip(continued(other, copy), wanted, strict=True):
            assert torch.equal(found, expected)


def test_a_copy_and_its_original_do_not_touch_each_other(open_empty: Open) -> None:
    model, session, tokens = tiny_model("llama"), open_empty(), text(64)
    row = session.admit(64)
    session.step([Feed(row, tokens[:30])])
    copy = session.restore(session.snapshot(row))
    other = [*tokens[:30], *text(34, seed=9)]
    for first in range(30, 64, 2):
        both = [Feed(row, tokens[first : first + 2]), Feed(copy, other[first : first + 2])]
        found = session.step(both)
    close(found[0], oracle_logits(model, tokens, MIXED, 64)[-1])
    close(found[1], oracle_logits(model, other, MIXED, 64)[-1])


def test_a_row_that_grows_leaves_the_others_as_they_are(open_empty: Open) -> None:
    session, texts = open_empty(), [text(80, seed) for seed in range(3)]
    rows = [session.admit(48) for _ in texts]
    session.step([Feed(row, tokens[:40]) for row, tokens in zip(rows, texts, strict=True)])
    taken = session.snapshot(rows[1])
    session.grow(rows[1], 96)
    assert session.kv_bytes() == planned(48, 96, 48)
    assert [session.capacity(row) for row in rows] == [48, 96, 48]
    copy = session.restore(taken)
    session.grow(copy, 96)
    for place in range(40, 48):
        found = session.step([Feed(row, [t[place]]) for row, t in zip(rows, texts, strict=True)])
        for index in (0, 2):
            wanted = oracle_logits(tiny_model("llama"), texts[index][: place + 1], MIXED, 48)
            close(found[index], wanted[-1])
        close(found[1], torch.as_tensor(session.step([Feed(copy, [texts[1][place]])]))[0])


def test_snapshots_of_something_else_are_refused(open_empty: Open) -> None:
    session = open_empty()
    taken = session.snapshot(session.admit(16))
    other = open_empty(plan_of((DENSE, DENSE), (DENSE, DENSE)))
    with pytest.raises(UsageError, match="the snapshot is of another model, plan or backend; res"):
        other.restore(taken)
    assert other.rows == ()


def test_a_released_row_frees_its_memory_and_copies_nothing(open_empty: Open) -> None:
    session: Any = open_empty()
    rows = [session.admit(64) for _ in range(3)]
    session.step([Feed(row, text(20, row)) for row in rows])
    kept = [_memory(session._row(row)) for row in (rows[0], rows[2])]
    gone = [weakref.ref(owner) for owner in _owners(session._row(rows[1]))]
    assert gone
    session.release(rows[1])
    gc.collect()
    assert [owner() for owner in gone] == [None] * len(gone)
    assert session.kv_bytes() == planned(64, 64)
    assert [_memory(session._row(row)) for row in (rows[0], rows[2])] == kept
    with pytest.raises(UsageError, match=f"the session has no row {rows[1]}; name one that was"):
        session.step([Feed(rows[1], [1])])
    session.step([Feed(row, [1]) for row in (rows[0], rows[2])])


def _owners(row: Any) -> list[Any]:
    """What owns the memory of a row's keys and values."""
    if hasattr(row, "memory"):
        return [row.memory]
    caches = [cache for layer in row.layers for cache in layer]
    return [tensor for cache in caches for tensor in (*cache.keys, *cache.values)]


def _memory(row: Any) -> list[int]:
    """Where a row's keys lie."""
    if hasattr(row, "caches"):
        return [cache.keys for cache in row.caches]
    return [cache.keys[0].data_ptr() for layer in row.layers for cache in layer]


def test_a_row_past_its_capacity_feeds_nobody(open_empty: Open) -> None:
    session = open_empty()
    small, large = session.admit(4), session.admit(64)
    with pytest.raises(MoacError, match="row 0 holds 0 of 4 tokens and cannot take 5 more; admit"):
        session.step([Feed(large, [1, 2]), Feed(small, [1] * 5)])
    assert (session.length(small), session.length(large)) == (0, 0)


@needs_compiler
def test_formats_the_kernels_do_not_know_are_refused() -> None:
    built: Any = open_cpu_session(
        tiny_model("llama"), MIXED, instruction_set="avx2", batch=1, capacity=8
    ).session
    sentence = "the CPU kernels do not know a format that weights or caches are stored in; compile"
    caches = built._row(0).caches
    for known in (CACHE_INT8, CACHE_INT4, CACHE_PLAIN):
        caches[1].format = known
        built._engine.check_caches(caches)
    caches[1].format = 3
    with pytest.raises(MoacError, match=sentence):
        built._engine.check_caches(caches)
    engine: CpuEngine = built._engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moac_runtime.backends.cpu.engine.WEIGHTS_PLAIN", 7)
        with pytest.raises(MoacError, match=sentence):
            CpuEngine(engine._library, engine.spec, _addresses(engine), dtype="float32", threads=1)


def _addresses(engine: CpuEngine) -> dict[str, int]:
    held: Any = engine._memory
    return {name: tensor.data_ptr() for name, tensor in held.items()}


def test_a_step_is_cut_where_it_is_full() -> None:
    """Feeds one after another, `most` tokens in all; a place for each wanted token's logits."""
    feeds = [Feed(0, range(5), [0, 3, 4]), Feed(1, [7]), Feed(2, range(4), ())]
    assert num_wanted(feeds) == 4
    steps = [[(p.feed, p.first, p.stop, list(p.wanted), p.place) for p in step]
             for step in cut(feeds, 4)]  # fmt: skip
    assert steps == [
        [(0, 0, 4, [0, 3], 0)],
        [(0, 4, 5, [0], 2), (1, 0, 1, [0], 3), (2, 0, 2, [], 4)],
        [(2, 2, 4, [], 4)],
    ]
    # rows that add one token each are never parted
    assert [len(step) for step in cut([Feed(row, [1]) for row in range(9)], 4)] == [9]
