"""The engine: rows that come and go under a limit of bytes, none of which heeds its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from engines import CONTEXT, alone, answers, asked, engine, run
from families import VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import ScriptedSession, scripted_model

from moac_runtime.engine.capacity import rung, rungs
from moac_runtime.engine.engine import Engine, PromptTooLong, QueueFull
from moac_runtime.engine.kept import KeptCaches
from moac_runtime.engine.request import Request
from moac_runtime.engine.sampling import SamplingOptions
from moac_runtime.errors import MoacError, UsageError


def text(count: int, seed: int = 0) -> list[int]:
    """Random tokens, of which none ends an answer."""
    random = Random(seed)
    return [random.randrange(3, VOCAB) for _ in range(count)]


def test_rungs_double_up_to_the_largest() -> None:
    assert rungs(4096) == [512, 1024, 2048, 4096]
    assert rungs(3000) == [512, 1024, 2048, 3000]
    assert rungs(100) == [100]
    assert [rung(n, 3000) for n in (1, 512, 513, 2049, 9999)] == [512, 512, 1024, 3000, 3000]


def mixed_requests() -> list[Request]:
    """Of several lengths, capacities and ways to sample."""
    wild = SamplingOptions(temperature=1.2, top_p=0.9, seed=5, max_tokens=20)
    return [
        asked(text(40, 1), max_tokens=12),
        asked(text(700, 2), max_tokens=9),
        asked(text(5, 3), options=wild),
        asked(text(300, 4), max_tokens=30, capacity=400),
        asked(text(90, 5), options=SamplingOptions(repetition_penalty=1.4, max_tokens=15)),
    ]


def test_rows_that_come_and_go_answer_as_alone() -> None:
    requests = mixed_requests()
    made = engine(step_tokens=64, rows=3)
    active = []
    for request in requests:  # each arrives a few steps after the one before
        active.append(made.submit(request))
        for _ in range(3):
            made.step()
    while made.step():
        pass
    assert [one.answer.token_ids for one in active] == [alone(request) for request in requests]
    assert made.memory.used == 0
    assert not made.session.rows


def test_a_cancelled_row_frees_its_bytes_and_changes_no_other() -> None:
    requests = mixed_requests()
    made = engine(step_tokens=64)
    active = [made.submit(request) for request in requests]
    made.step()
    before = made.memory.used
    size = made.memory.planned(active[1].path[-1][0])
    made.cancel(active[1])
    assert made.memory.used == before - size
    made.cancel(active[1])  # once more does nothing
    while made.step():
        pass
    for place in (0, 2, 3, 4):
        assert active[place].answer.token_ids == alone(requests[place])
    assert active[1].answer.finish_reason == "interrupted"
    assert made.totals.cancelled == 1
    assert made.memory.used == 0


def test_a_request_that_waits_can_be_cancelled() -> None:
    made = engine(rows=1)
    first, second = made.submit(asked(text(20))), made.submit(asked(text(21)))
    made.step()
    made.cancel(second)
    assert made.waiting == 0
    while made.step():
        pass
    assert (first.answer.finish_reason, second.answer.token_ids) == ("length", [])


def test_a_long_prompt_holds_up_no_one_who_writes() -> None:
    made = engine(step_tokens=32)
    short = made.submit(asked(text(10), max_tokens=40))
    made.step()
    long = made.submit(asked(text(600, 1), max_tokens=2))
    for steps in range(1, 15):
        made.step()
        assert len(short.answer.token_ids) == 1 + steps
        assert long.fed == 31 * steps  # the step's other tokens are the prompt's


def test_a_step_has_at_most_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(step_tokens=50)
    step, sizes = made.session.step, []

    def counted(feeds: Any) -> Any:
        sizes.append(sum(len(feed.tokens) for feed in feeds))
        return step(feeds)

    monkeypatch.setattr(made.session, "step", counted)
    run(made, *(asked(text(70, seed), max_tokens=3) for seed in range(4)))
    assert max(sizes) == 50


def test_a_step_beside_writers_reads_as_much_as_its_time_allows() -> None:
    ticks = iter(range(100000))
    made = engine(step_tokens=512, step_s=1e-9)
    made._clock = lambda: float(next(ticks))
    writer = made.submit(asked(text(40), max_tokens=50))
    made.step()
    reader = made.submit(asked(text(400, 1)))
    made.step()
    assert (writer.done, reader.fed) == (False, 32)  # the least that is worth a step


def test_admission_is_first_come_first_served_by_bytes() -> None:
    made = engine(kept_bytes=0)
    small, large = made.memory.planned(512), made.memory.planned(1024)
    made.memory.limit = small + large - 1
    first = made.submit(asked(text(30, 1), max_tokens=6))
    second = made.submit(asked(text(600, 2), max_tokens=4))
    third = made.submit(asked(text(30, 3), max_tokens=4))
    made.step()
    # the second does not fit beside the first, and the third does not overtake it
    assert (first.row is None, second.row is None, third.row is None) == (False, True, True)
    most = 0
    while made.step():
        most = max(most, made.memory.used)
    assert most <= made.memory.limit
    assert first.admitted < second.admitted < third.admitted  # type: ignore[operator]
    assert second.answer.token_ids == alone(second.request)


def test_bytes_are_the_planned_ones_from_admission_to_the_end() -> None:
    made = engine(kept_bytes=0)
    active = made.submit(asked(text(100), max_tokens=20))
    made.step()
    planned = made.memory.planned(512)
    # keys and values, 16 elements of 4 bytes: spans at 512 are 128, 512, 56 and 256
    assert planned == (128 + 512 + 56 + 256) * 16 * 4 * 2
    assert made.memory.used == planned
    while made.step():
        assert made.memory.used in (planned, 0)
    assert active.done


def test_what_can_never_run_is_refused_with_both_numbers() -> None:
    made = engine(kv_bytes=1000)
    with pytest.raises(UsageError, match=r"row of 512 tokens takes 121856 bytes .* limit is 1000"):
        made.submit(asked(text(10)))
    made = engine()
    with pytest.raises(PromptTooLong, match=rf"has {CONTEXT} tokens, .* may have {CONTEXT}"):
        made.submit(asked(text(CONTEXT)))
    with pytest.raises(PromptTooLong, match=r"has 64 tokens, .* may have 64"):
        made.submit(asked(text(64), capacity=64))
    assert made.waiting == 0


def test_a_full_queue_refuses() -> None:
    made = engine(waiting=2)
    made.submit(asked(text(10)))
    made.submit(asked(text(10)))
    with pytest.raises(QueueFull, match="2 requests wait already"):
        made.submit(asked(text(10)))
    made.step()
    made.submit(asked(text(10)))


def test_an_answer_ends_at_the_largest_capacity() -> None:
    (active,) = run(engine(), asked(text(CONTEXT - 5), max_tokens=500))
    assert (len(active.answer.token_ids), active.answer.finish_reason) == (5, "length")


# ---- growth


def open_ended(count: int, seed: int = 0, longest: int = 5000) -> Request:
    options = SamplingOptions(temperature=1.0, seed=seed, max_tokens=longest)
    return asked(text(count, seed), options=options, open_ended=True)


def test_an_answer_without_a_length_starts_with_room_and_grows() -> None:
    made = engine(kept_bytes=0)
    active = made.submit(open_ended(1000, longest=1200))
    made.step()
    assert active.path == ((2048, 0),)
    made = engine(context=1024)
    assert made.submit(open_ended(100)).request.planned == 1124
    made.step()  # prompt + 1024 is more than there is: the largest rung
    assert made._running[0].path == ((1024, 0),)


def grown_by_hand(request: Request, capacities: list[int], count: int) -> list[int]:
    """What a session that is grown when it is full answers, greedy."""
    session = engine().session
    from moac_runtime.backends.session import Feed

    row = session.admit(capacities[0])
    tokens, found = list(request.tokens), []
    while len(found) < count:
        logits = session.step([Feed(row, tokens)])
        tokens = [int(logits[0].argmax())]
        found += tokens
        if session.length(row) == session.capacity(row):
            session.grow(row, capacities[capacities.index(session.capacity(row)) + 1])
    return found


def test_growth_follows_the_documented_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moac_runtime.engine.request.OPEN_ENDED", 4)
    made = engine(kept_bytes=0)
    options = SamplingOptions(max_tokens=100)
    request = asked(text(505), options=options, open_ended=True)
    (active,) = run(made, request)
    assert active.path == ((512, 0), (1024, 512))
    assert active.answer.token_ids == grown_by_hand(request, [512, 1024], 100)


def test_a_fixed_capacity_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moac_runtime.engine.request.OPEN_ENDED", 4)
    (active,) = run(engine(fixed_capacity=True), open_ended(505))
    assert active.path == ((512, 0),)
    assert (len(active.answer.token_ids), active.answer.finish_reason) == (7, "length")


def test_rows_that_wait_for_each_other_to_grow_do_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moac_runtime.engine.request.OPEN_ENDED", 4)
    made = engine(kept_bytes=0)
    made.memory.limit = made.memory.planned(512) + made.memory.planned(1024) - 1
    old, young = run(made, open_ended(505, 1, longest=40), open_ended(505, 2, longest=40))
    assert young.answer.finish_reason == "length"
    assert young.path == ((512, 0),)
    assert old.path == ((512, 0), (1024, 512))
    assert len(old.answer.token_ids) == 40
    assert made.memory.used == 0


# ---- kept caches


def marked(prefix: int, rest: int, seed: int, **options: Any) -> Request:
    """A prompt whose first tokens are those of every other with as long a prefix."""
    tokens = text(prefix, 77) + text(rest, seed)
    return asked(tokens, marks=(prefix,), capacity=256, **options)


def test_prompts_fan_out_from_what_they_share() -> None:
    made = engine()
    requests = [marked(100, 10 + seed, seed) for seed in range(4)]
    first, *others = run(made, *requests)
    assert first.reused == 0
    assert [one.reused for one in others] == [100] * 3  # they waited for the first to read it
    assert [one.answer.token_ids for one in (first, *others)] == [alone(r) for r in requests]
    assert made.totals.reused == 300


def test_a_turn_goes_on_from_the_last_one() -> None:
    made = engine()
    (first,) = run(made, asked(text(80), capacity=256))
    turn = [*first.request.tokens, *first.answer.token_ids, *text(20, 9)]
    (second,) = run(made, asked(turn, capacity=256))
    assert second.reused == 80 + len(first.answer.token_ids) - 1  # the last one was never fed
    assert second.answer.token_ids == alone(asked(turn, capacity=256))


def test_a_cache_serves_its_own_capacity_alone() -> None:
    made = engine()
    run(made, asked(text(80), capacity=256))
    (other,) = run(made, asked([*text(80), 5], capacity=128))
    assert other.reused == 0
    assert other.answer.token_ids == alone(other.request)


def test_nothing_is_rewound() -> None:
    made = engine()
    run(made, asked(text(120), capacity=256))
    branch = text(100) + text(5, 4)  # leaves the kept text before its end
    (found,) = run(made, asked(branch, capacity=256))
    assert found.reused == 0
    assert found.answer.token_ids == alone(found.request)


def test_caches_make_way_for_others_within_the_budget() -> None:
    made = engine()
    (active,) = run(made, asked(text(80), capacity=256))
    size = made.kept.bytes
    assert 0 < size < made.memory.planned(256)  # free slots are not kept
    made = engine(kept_bytes=int(2.5 * size))
    for seed in range(3):
        run(made, asked(text(80, seed), capacity=256))
        run(made, asked([*text(80, 0), 9], capacity=256))  # used again and again
    assert made.kept.bytes <= int(2.5 * size)
    assert made.kept.evicted > 0
    assert active.done


def test_a_cache_larger_than_the_budget_is_not_kept() -> None:
    made = engine(kept_bytes=100)
    run(made, asked(text(80), capacity=256))
    assert (len(made.kept), made.kept.bytes) == (0, 0)
    assert KeptCaches(0).worth_keeping(1000, 0) is False


FORKS: dict[str, st.SearchStrategy[Any]] = {
    "length": st.integers(1, 100),
    "cut": st.integers(1, 100),
    "continuations": st.tuples(st.integers(1, 40), st.integers(1, 40)),
    "rows": st.integers(1, 3),
    "chunk": st.integers(3, 64),
}


def check_forks(
    opened: Callable[..., Engine],
    length: int,
    cut: int,
    continuations: tuple[int, int],
    rows: int,
    chunk: int,
) -> None:
    """What forks at `cut`, and what goes on from an answer, is what a cold sequence gives."""
    prompt = text(length + 20, length)
    cut = min(cut, len(prompt) - 1)
    made = opened(step_tokens=chunk)
    first = asked(prompt, capacity=256, marks=(cut,), max_tokens=7)
    others = [
        asked(prompt[:cut] + text(more, seed), capacity=256, marks=(cut,), max_tokens=7)
        for seed, more in enumerate(continuations)
    ]
    found = answers(made, first, *others * rows)
    wanted = [answers(opened(kept_bytes=0), request)[0] for request in (first, *others)]
    assert found == [wanted[0], *wanted[1:] * rows]
    turn = asked([*prompt, *found[0], *text(9, 3)], capacity=256, max_tokens=7)
    assert answers(made, turn) == answers(opened(kept_bytes=0), turn)
    assert made.totals.reused >= length + 20  # the turn went on from the answer before it


@settings(max_examples=25, deadline=None)
@given(**FORKS)
def test_restored_and_forked_sequences_continue_as_cold_ones(**forks: Any) -> None:
    check_forks(engine, **forks)


# ---- what goes wrong


def test_a_failing_step_ends_its_sequences_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(kept_bytes=0)
    step = made.session.step

    def failing(feeds: Any) -> Any:
        monkeypatch.setattr(made.session, "step", step)
        raise MoacError("short of memory")

    monkeypatch.setattr(made.session, "step", failing)
    active = made.submit(asked(text(20)))
    made.step()
    assert str(active.error) == "short of memory"
    assert made.memory.used == 0
    (after,) = run(made, asked(text(20)))
    assert after.answer.token_ids == alone(after.request)


def test_log_probabilities_are_those_of_the_model() -> None:
    import torch

    from moac_runtime.backends.session import Feed

    (active,) = run(engine(), asked(text(20), max_tokens=3, logprobs=4))
    session = engine().session
    logits = session.step([Feed(session.admit(512), text(20))])
    wanted = logits[0].double().log_softmax(-1)
    first = active.logprobs[0]
    best = wanted.topk(4)
    assert [token for token, _ in first.top] == best.indices.tolist()
    torch.testing.assert_close(
        torch.tensor([value for _, value in first.top], dtype=torch.float64), best.values
    )
    assert first.logprob == pytest.approx(float(wanted[active.answer.token_ids[0]]))
    assert [one.token for one in active.logprobs] == active.answer.token_ids


def test_fixed_batches_take_requests_of_one_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedSession, "fixed_batch", True)
    scripted, _ = scripted_model("abc", capacity=2000, context=2000)
    made = scripted.engine(kept_bytes=2**20)
    small, large, other = (
        made.submit(asked(text(count), max_tokens=9)) for count in (20, 600, 30)
    )
    made.step()
    late = made.submit(asked(text(25), max_tokens=9))
    assert [one.row is None for one in (small, large, other, late)] == [False, True, False, True]
    while made.step():
        assert late.row is None or (small.done and large.done and other.done)
    assert [one.answer.text for one in (small, large, other, late)] == ["abc"] * 4
    assert len(made.kept) == 0
    with pytest.raises(UsageError, match="runs fixed batches, which no limit of KV bytes cuts"):
        scripted.engine(kv_bytes=10)
