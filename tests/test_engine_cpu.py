"""The engine on the native kernels: what holds on torch holds there too."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cpu_kernels import needs_avx2, needs_compiler
from engines import answers, asked
from families import VOCAB
from hypothesis import given, settings
from servers import server
from test_engine import FORKS, check_forks, text

from moac_runtime.engine.engine import Engine
from moac_runtime.engine.model import Model, load
from moac_runtime.engine.request import Request

pytestmark = [needs_avx2, needs_compiler]


@pytest.fixture(scope="module")
def native(cpu_package: Path) -> Model:
    return load(cpu_package, backend="cpu", dtype="float32")


def requests() -> list[Request]:
    shared = text(300, 77)
    return [
        asked(text(40, 1), max_tokens=12),
        asked(shared + text(30, 2), marks=(300,), max_tokens=9),
        asked(shared + text(70, 3), marks=(300,), max_tokens=9),
        asked(text(900, 4), max_tokens=20),
    ]


def test_rows_answer_as_alone_and_share_what_was_read(native: Model) -> None:
    made = native.engine(kept_bytes=2**26, step_tokens=100)
    found = answers(made, *requests())
    assert found == [answers(native.engine(), request)[0] for request in requests()]
    assert made.totals.reused == 300
    assert made.memory.used == 0


@settings(max_examples=25, deadline=None)
@given(**FORKS)
def test_restored_and_forked_sequences_continue_as_cold_ones(native: Model, **forks: Any) -> None:
    endless = copy(native)
    endless.tokenizer = replace(native.tokenizer, eos_token_ids=frozenset({VOCAB}))

    def opened(**limits: Any) -> Engine:
        return endless.engine(**{"kept_bytes": 2**26, **limits})

    check_forks(opened, **forks)


def test_a_turn_goes_on_from_the_last_one(native: Model) -> None:
    made = native.engine(kept_bytes=2**26)
    first = asked(text(600, 5), max_tokens=30)
    (said,) = answers(made, first)
    turn = asked([*first.tokens, *said, *text(20, 6)], max_tokens=10)
    assert answers(made, turn) == answers(native.engine(), turn)
    assert made.totals.reused == 600 + len(said) - 1


def test_a_limit_of_bytes_holds(native: Model) -> None:
    made = native.engine()
    made.memory.limit = 2 * made.memory.planned(512)
    most = 0
    active = [made.submit(asked(text(30, seed), max_tokens=5)) for seed in range(5)]
    while made.step():
        most = max(most, made.memory.used)
    assert most == made.memory.limit
    assert all(one.done for one in active)


def test_a_saved_chat_goes_on_token_for_token(native: Model, tmp_path: Path) -> None:
    talk = native.chat(system="You are terse.", max_tokens=20)
    talk.say("Name a fish, and say why.")
    talk.save(tmp_path / "chat.safetensors")
    wanted = talk.say("Another?")
    other = native.chat(max_tokens=20)
    other.load(tmp_path / "chat.safetensors")
    assert other.say("Another?") == wanted
    assert other.last is not None
    assert other.last.reused_tokens > 20


def test_a_chat_grows(native: Model) -> None:
    talk = native.chat(max_tokens=100)
    for _ in range(8):
        talk.say("the quick brown fox jumps over the lazy dog " * 3)
    assert talk.last is not None
    assert talk.last.capacity > 512
    assert talk.last.reused_tokens > 0


def test_the_server_answers_as_the_model_does(native: Model) -> None:
    with server(native) as running:
        (wanted,) = native.generate("hi", max_tokens=12, capacity=512)
        for _ in range(2):
            _, found = running.chat("hi", max_tokens=12)
            assert found["choices"][0]["message"]["content"] == wanted.text
        held = found["usage"]["moac"]
        assert 0 < held["kv_bytes"] < held["dense_bytes"]
