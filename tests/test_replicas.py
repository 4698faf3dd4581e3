"""A server of replicas: who is asked, what happens where one ends, and the same API as of one.

Replicas run in this process; `test_replica_processes` has those that Ray runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Door, opened
from test_serve import CHAT
from tiny import Compiled, moac_command

import moac_runtime.serve.command as serve_command
from moac_runtime.errors import MoacError
from moac_runtime.serve.errors import ApiError
from moac_runtime.serve.replicas.front import build_front
from moac_runtime.serve.replicas.merged import merged
from moac_runtime.serve.replicas.pool import Gone, Pool
from moac_runtime.serve.replicas.replica import Message, Replica, Standing
from moac_runtime.serve.replicas.routing import key_of, ranked

# ---- who is asked


def body(*contents: str, system: str | None = None) -> bytes:
    """A conversation whose turns alternate."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(contents)]
    begun = [{"role": "system", "content": system}] if system else []
    return json.dumps({"messages": begun + messages}).encode()


def test_the_turns_of_a_conversation_share_a_key() -> None:
    first = key_of(body("hi", system="be brief"))
    assert first
    assert key_of(body("hi", "hello", "and you?", system="be brief")) == first
    others = [body("ho", system="be brief"), body("hi", system="be long"), body("hi")]
    assert len({first, *map(key_of, others)}) == 4


def test_a_prompt_is_known_by_its_beginning() -> None:
    def key(prompt: Any) -> str:
        return key_of(json.dumps({"prompt": prompt}).encode())

    assert key("a" * 256 + "b") == key("a" * 300)
    assert key("a" * 255 + "b") != key("a" * 300)
    assert key([1, 2]) != key([1, 3])


@pytest.mark.parametrize(
    "found", [b"", b"{", b"[]", b"5", b"{}", b'{"messages": 5}', b'{"prompt": 5}', b"[" * 99999]
)
def test_what_tells_nothing_has_no_key(found: bytes) -> None:
    assert key_of(found) == ""


def test_a_key_keeps_its_replica_when_others_go_and_come() -> None:
    names, keys = list("abcd"), [str(number) for number in range(200)]
    homes = {key: ranked(key, dict.fromkeys(names, 0))[0] for key in keys}
    assert all(list(homes.values()).count(name) > 25 for name in names)
    for key, home in homes.items():
        fewer = ranked(key, dict.fromkeys("abc", 0))
        assert sorted(fewer) == ["a", "b", "c"]
        assert home == "d" or fewer[0] == home


def test_a_busy_replica_sends_a_key_elsewhere() -> None:
    home, other = ranked("key", {"a": 0, "b": 0})
    assert ranked("key", {home: 4, other: 0}) == [home, other]
    assert ranked("key", {home: 5, other: 0}) == [other, home]
    assert ranked("", {home: 1, other: 0}) == [other, home]
    assert ranked("key", {}) == []


# ---- where one ends


class Scripted:
    """Answers with its name in two pieces; `ends`: before which of them it is gone."""

    def __init__(self, name: str) -> None:
        self.name, self.ends, self.asked = name, -1, 0
        self.back = asyncio.Event()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message]]:
        self.asked += 1
        for place in range(2):
            if place == self.ends:
                raise Gone
            yield [{"type": self.name}]
            await asyncio.sleep(0)

    async def tell(self) -> Standing:
        if self.ends >= 0 and not self.back.is_set():
            await self.back.wait()
            raise Gone  # what its successor's predecessor still said
        return Standing(1, 2, b"")


async def said(pool: Pool, key: str) -> list[str]:
    return [message["type"] async for batch in pool.answer(key, {}, b"") for message in batch]


def scripted() -> tuple[dict[str, Scripted], Pool, Scripted, Scripted]:
    """Two replicas, their pool, and the home of the key "key" before the other one."""
    made = {name: Scripted(name) for name in "ab"}
    home, other = (made[name] for name in ranked("key", dict.fromkeys(made, 0)))
    return made, Pool(made), home, other


def test_one_that_ends_before_it_answers_is_replaced_and_comes_again() -> None:
    async def run() -> None:
        made, pool, home, other = scripted()
        assert await said(pool, "key") == [home.name] * 2
        home.ends = 0
        assert await said(pool, "key") == [other.name] * 2
        assert pool.here == [other.name]
        assert list(await pool.tell()) == [other.name]
        assert await said(pool, "key") == [other.name] * 2
        assert home.asked == 2  # who is gone is not asked
        home.back.set()
        home.ends = -1
        while len(pool.here) < 2:
            await asyncio.sleep(0.01)
        assert await said(pool, "key") == [home.name] * 2
        assert len(await pool.tell()) == len(made) == len(pool)

    asyncio.run(run())


def test_one_that_ends_within_its_answer_is_told() -> None:
    async def run() -> None:
        _, pool, home, other = scripted()
        home.ends = 1
        with pytest.raises(Gone):
            await said(pool, "key")
        assert (other.asked, pool.here) == (0, [other.name])
        pool.close()

    asyncio.run(run())


def test_where_none_runs_a_request_is_refused() -> None:
    async def run() -> None:
        made, pool, _, _ = scripted()
        for one in made.values():
            one.ends = 0
        with pytest.raises(ApiError, match="no replica runs now") as caught:
            await said(pool, "key")
        assert (caught.value.status, caught.value.retry_after) == (503, 5)
        pool.close()

    asyncio.run(run())


def test_one_that_ends_while_idle_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moac_runtime.serve.replicas.pool._LATE_S", 0.01)
    monkeypatch.setattr("moac_runtime.serve.replicas.pool._LOOK_S", 0.01)

    async def run() -> None:
        _, pool, home, other = scripted()
        home.ends = 0  # it tells nothing until it is back
        watching = asyncio.ensure_future(pool.watch())
        while len(pool.here) == 2:
            await asyncio.sleep(0.01)
        assert (pool.here, home.asked) == ([other.name], 0)
        assert await said(pool, "key") == [other.name] * 2
        watching.cancel()
        pool.close()

    asyncio.run(run())


def test_requests_without_a_key_are_spread() -> None:
    async def run() -> None:
        made, pool, _, _ = scripted()
        await asyncio.gather(*(said(pool, "") for _ in range(8)))
        assert [one.asked for one in made.values()] == [4, 4]

    asyncio.run(run())


def test_metrics_are_told_apart_by_replica() -> None:
    text = (
        b"# HELP moac_steps_total Steps\n# TYPE moac_steps_total counter\nmoac_steps_total 3.0\n"
        b"# HELP moac_kv_bytes Bytes\n# TYPE moac_kv_bytes gauge\nmoac_kv_bytes 5.0\n"
        b"# HELP moac_requests_total Requests\n# TYPE moac_requests_total counter\n"
    )
    lines = merged({"0": text, "1": text}).decode().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'moac_steps_total{replica="0"} 3.0',
        'moac_steps_total{replica="1"} 3.0',
        'moac_kv_bytes{replica="0"} 5.0',
        'moac_kv_bytes{replica="1"} 5.0',
    ]
    assert sum(line.startswith("# TYPE") for line in lines) == 2


# ---- the same API


def options(package: Path, *words: str) -> argparse.Namespace:
    return serve_command.parser().parse_args([str(package), *words])


class Mortal(Replica):
    """One that ends after `left` batches of each answer, None is never."""

    left: int | None = None

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message]]:
        left = self.left
        async for batch in super().answer(scope, body):
            if left == 0:
                raise Gone
            yield batch
            left = None if left is None else left - 1


@pytest.fixture(scope="module")
def pair(tiny_package: Compiled) -> Iterator[list[Mortal]]:
    asked = options(tiny_package.package, "--served-model-name", "tiny", "--context", "1024")
    made = [Mortal(asked) for _ in range(2)]
    yield made
    for one in made:
        one._opened.thread.close()


@pytest.fixture
def door(pair: list[Mortal]) -> Iterator[Door]:
    for one in pair:
        one.left = None
    with opened(build_front(Pool(dict(zip("01", pair, strict=True))))) as found:
        yield found


def test_replies_are_those_of_one_process(door: Door) -> None:
    status, listed, _ = door.ask("/v1/models")
    assert (status, listed["data"][0]["id"]) == (200, "tiny")
    status, found = door.chat("once upon", max_tokens=9, temperature=0)
    assert status == 200
    wanted = found["choices"][0]["message"]["content"]
    chunks = door.stream(
        CHAT,
        {
            "messages": [{"role": "user", "content": "once upon"}],
            "max_tokens": 9,
            "temperature": 0,
        },
    )
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == wanted
    status, text, _ = door.ask("/v1/completions", {"prompt": "once", "max_tokens": 3})
    assert (status, text["object"]) == (200, "text_completion")
    assert "<html" in door.ask("/")[1]


def test_refusals_are_those_of_one_process(door: Door) -> None:
    assert door.chat("hi", logit_bias={"5": 1})[0] == 400
    assert door.chat("hi", model="other")[0] == 404
    assert door.ask("/v1/models/other")[0] == 404
    assert door.ask(CHAT, b"{")[0] == 400
    assert door.ask(CHAT, {"messages": []}, method="PUT")[0] == 405
    status, found, _ = door.ask("/nowhere")
    assert (status, found["error"]["type"]) == (404, "not_found_error")
    assert door.ask(CHAT, b" " * (16 * 2**20 + 1))[0] == 413


def test_turns_go_where_their_beginning_is_kept(door: Door, pair: list[Mortal]) -> None:
    homes = []
    for place in range(6):
        turns: list[dict[str, str]] = []
        read = [one._opened.engine.totals.read for one in pair]
        for content in (f"{place} is a number, and a long enough beginning", "go on", "and on"):
            turns.append({"role": "user", "content": content})
            status, found = door.chat(messages=turns, max_tokens=4)
            assert status == 200
            cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 0) == (len(turns) > 1)
            turns.append(found["choices"][0]["message"])
        grown = [one._opened.engine.totals.read > was for one, was in zip(pair, read, strict=True)]
        assert sum(grown) == 1
        homes.append(grown.index(True))
    assert set(homes) == {0, 1}


def test_one_log_line_tells_what_the_replica_did(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "moac.serve"):
        door.ask(CHAT, json.loads(body("hi")) | {"max_tokens": 2}, X_Request_Id="mine")
    (line,) = [one.getMessage() for one in caplog.records]
    assert line.startswith(f"POST {CHAT} status=200 ")
    assert " answer=2 " in line
    assert line.endswith(" id=mine")


def test_health_and_metrics_are_of_all(door: Door) -> None:
    assert door.ask("/health")[1] == {
        "status": "ok",
        "running": 0,
        "waiting": 0,
        "replicas": {"running": 2, "of": 2},
    }
    _, text, _ = door.ask("/metrics")
    assert [f'moac_kv_bytes{{replica="{name}"}} 0.0' in text for name in "01"] == [True, True]
    assert text.count("# TYPE moac_requests_total") == 1


def test_keys_are_asked_for_at_the_door(pair: list[Mortal]) -> None:
    with opened(build_front(Pool({"0": pair[0]}), ["secret"])) as closed:
        assert closed.ask("/v1/models")[0] == 401
        assert closed.ask("/v1/models", Authorization="Bearer secret")[0] == 200
        assert closed.ask("/health")[0] == 200


def test_a_client_that_leaves_ends_its_sequence(door: Door, pair: list[Mortal]) -> None:
    def cancelled() -> int:
        return sum(one._opened.engine.totals.cancelled for one in pair)

    before = cancelled()
    for stream in (True, False):
        connection = door.connect()
        asked = json.loads(body("hi")) | {"max_tokens": 900, "stream": stream}
        connection.request("POST", CHAT, json.dumps(asked), {"Content-Type": "application/json"})
        door.until(lambda: sum(one._opened.thread.state.running for one in pair) == 1)
        connection.close()
        door.until(lambda: sum(one._opened.thread.state.running for one in pair) == 0)
    assert cancelled() == before + 2


def test_an_answer_whose_replica_ends_is_given_by_another(door: Door, pair: list[Mortal]) -> None:
    for dying in (0, 1):
        for place, one in enumerate(pair):
            one.left = 0 if place == dying else None
        for text in ("red", "green", "blue", "white"):
            status, found = door.chat(text, max_tokens=3)
            assert (status, found["usage"]["completion_tokens"]) == (200, 3)
        for one in pair:
            one.left = None
        door.until(lambda: door.ask("/health")[1]["replicas"]["running"] == 2)


def test_a_stream_whose_replica_ends_says_so(door: Door, pair: list[Mortal]) -> None:
    for one in pair:
        one.left = 1
    chunks = door.stream(CHAT, json.loads(body("hi")) | {"max_tokens": 500})
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["error"]["code"] == "replica_ended"


# ---- the command


def test_a_replica_that_cannot_serve_tells_why(
    tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, code, package in (
        (("--context", "9999"), 2, tiny_package.package),
        ((), 1, tmp_path),
    ):
        replica = Replica(options(package, *words))
        about = asyncio.run(replica.about())
        assert about.fault
        assert (about.exit_code, about.lines) == (code, ())
        asyncio.run(replica.check_health())
        with monkeypatch.context() as patch:
            patch.setattr("moac_runtime.serve.replicas.replica._PATIENCE_S", 0)
            with pytest.raises(MoacError) as caught:
                asyncio.run(replica.check_health())
        assert str(caught.value) == about.fault


def test_a_replica_without_its_thread_is_not_healthy(tiny_package: Compiled) -> None:
    replica = Replica(options(tiny_package.package))
    asyncio.run(replica.check_health())
    replica._opened.thread.close()
    with pytest.raises(MoacError, match="the engine's thread has ended"):
        asyncio.run(replica.check_health())


def test_replicas_need_their_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moac_runtime.host.extras.find_spec", lambda name: name != "ray" or None)
    assert moac_command("serve", "nowhere", "--replicas", 2) == 2
    assert capsys.readouterr().err == (
        "error: --replicas needs ray, which is not installed; run: pip install 'moac[ray]'\n"
    )
    assert moac_command("serve", "nowhere", "--replicas", 0) == 2
    assert "--replicas must be 1 or more, got 0" in capsys.readouterr().err
