"""The server as raw HTTP meets it: what is served, what is refused, and who goes away."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from engines import CONTEXT, model
from servers import NAME, Running, server

from moac_runtime.engine.sampling import SamplingOptions
from moac_runtime.serve.body import MOST_BYTES


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with server() as found:
        yield found


CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def test_models(running: Running) -> None:
    status, found, _ = running.ask("/v1/models")
    assert status == 200
    (one,) = found["data"]
    assert (one["id"], one["object"], one["max_model_len"]) == (NAME, "model", CONTEXT)
    assert running.ask(f"/v1/models/{NAME}")[1] == one
    assert running.ask("/v1/models/other")[0] == 404


def test_health(running: Running) -> None:
    status, found, _ = running.ask("/health")
    assert (status, found["status"]) == (200, "ok")


def test_a_chat_answers_as_the_model_does(running: Running) -> None:
    status, found = running.chat("hi", max_tokens=12)
    (wanted,) = model().generate("hi", max_tokens=12, capacity=512)
    assert status == 200
    (choice,) = found["choices"]
    assert choice["message"]["content"] == wanted.text
    assert choice["finish_reason"] == wanted.finish_reason
    assert found["object"] == "chat.completion"
    assert found["usage"]["prompt_tokens"] == wanted.prompt_tokens
    assert found["usage"]["completion_tokens"] == len(wanted.token_ids)
    assert found["usage"]["total_tokens"] == wanted.prompt_tokens + len(wanted.token_ids)


def check_stream(chunks: list[dict[str, Any]], *, choices: int = 1) -> list[str]:
    """What every strict reader asks of a chat's stream; the text of each choice."""
    assert len({chunk["id"] for chunk in chunks}) == 1
    texts = [""] * choices
    seen: list[list[dict[str, Any]]] = [[] for _ in range(choices)]
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        for choice in chunk["choices"]:
            assert set(choice) >= {"index", "delta", "finish_reason"}
            seen[choice["index"]].append(choice)
            texts[choice["index"]] += choice["delta"].get("content") or ""
    for each in seen:
        assert each[0]["delta"]["role"] == "assistant"
        assert all(choice["finish_reason"] is None for choice in each[:-1])
        assert each[-1]["delta"] == {}
        assert each[-1]["finish_reason"] in ("stop", "length", "tool_calls")
        assert all("role" not in choice["delta"] for choice in each[1:])
    return texts


def test_a_stream_is_what_strict_readers_ask_for(running: Running) -> None:
    asked = {"messages": HI, "max_tokens": 20, "logprobs": True}
    chunks = running.stream(CHAT, {**asked, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    _, whole = running.chat("hi", max_tokens=20)
    assert check_stream(chunks) == [whole["choices"][0]["message"]["content"]]
    sent = sum(
        len(choice["logprobs"]["content"])
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["logprobs"]
    )
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == sent == whole["usage"]["completion_tokens"]
    assert usage["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    plain = running.stream(CHAT, asked)
    assert all("usage" not in chunk for chunk in plain)


def test_a_completion_streams_and_ends(running: Running) -> None:
    asked = {"prompt": "once upon", "max_tokens": 9}
    chunks = running.stream(
        "/v1/completions", {**asked, "stream_options": {"include_usage": True}}
    )
    _, whole, _ = running.ask("/v1/completions", asked)
    assert (
        "".join(c["text"] for chunk in chunks for c in chunk["choices"])
        == (whole["choices"][0]["text"])
    )
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == {
        **whole["usage"],
        **{"prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]},
    }
    assert whole["object"] == "text_completion"


@pytest.mark.parametrize("prompt", [["a b", "c"], [[5, 6, 7], [8]], [5, 6, 7], "text"])
def test_prompts_of_a_completion(running: Running, prompt: Any) -> None:
    asked = {"prompt": prompt, "n": 2, "temperature": 1, "seed": 4}
    status, found, _ = running.ask("/v1/completions", asked)
    count = 2 * (len(prompt) if isinstance(prompt, list) and prompt[0] != 5 else 1)
    assert status == 200
    assert [choice["index"] for choice in found["choices"]] == list(range(count))
    assert found["usage"]["completion_tokens"] <= 16 * count


@pytest.mark.parametrize(
    "field",
    [
        *("user", "metadata", "store", "service_tier", "parallel_tool_calls"),
        *("safety_identifier", "prompt_cache_key", "extra_of_tomorrow"),
    ],
)
def test_fields_that_change_no_answer_are_ignored(running: Running, field: str) -> None:
    status, found = running.chat(max_tokens=5, **{field: "x"})
    assert status == 200
    assert found["choices"] == running.chat(max_tokens=5)[1]["choices"]


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("frequency_penalty", 0, 0.5),
        ("presence_penalty", 0.0, -1),
        ("logit_bias", {}, {"5": 100}),
        ("modalities", ["text"], ["text", "audio"]),
        ("functions", [], [{"name": "f"}]),
        ("min_tokens", 0, 5),
        ("ignore_eos", False, True),
        ("reasoning_effort", None, "high"),
        ("guided_json", None, {}),
        ("echo", False, True),
        ("best_of", 1, 3),
    ],
)
def test_fields_that_would_change_it_are_refused_unless_neutral(
    running: Running, field: str, neutral: Any, other: Any
) -> None:
    assert running.chat(max_tokens=2, **{field: neutral})[0] == 200
    status, found = running.chat(max_tokens=2, **{field: other})
    assert (status, found["error"]["param"]) == (400, field)
    assert field in found["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -3}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": "x"}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
        ),
        ({"messages": None}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
        ({"model": "gpt-4"}, "model"),
    ],
)
def test_what_cannot_be_meant_names_its_field(
    running: Running, fields: dict[str, Any], param: str
) -> None:
    status, found = running.chat(**fields)
    assert (status, found["error"]["param"]) == (404 if param == "model" else 400, param)
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert not found["error"]["message"].endswith(".")
    assert running.chat(max_tokens=1)[0] == 200  # as before


def test_a_prompt_past_the_capacity_names_both_numbers(running: Running) -> None:
    text = "the quick brown fox " * 800
    status, found = running.chat(text)
    assert (status, found["error"]["code"]) == (400, "context_length_exceeded")
    counts = [int(n) for n in re.findall(r"\d+", found["error"]["message"])]
    assert counts[0] > counts[1] == CONTEXT


RAW: list[tuple[bytes, dict[str, str], int]] = [
    (b"{", {}, 400),
    (b"", {}, 400),
    (b"[1]", {}, 400),
    (b'"x"', {}, 400),
    (b"\xff\xfe", {}, 400),
    (b'{"messages": NaN}', {}, 400),
    (b"[" * 100_000, {}, 400),
    (b"{}", {"Content_Type": "text/plain"}, 415),
    (b"a=b", {"Content_Type": "application/x-www-form-urlencoded"}, 415),
    (b" " * (MOST_BYTES + 1), {}, 413),
]


@pytest.mark.parametrize(("body", "headers", "status"), RAW)
def test_a_body_that_is_none(
    running: Running, body: bytes, headers: dict[str, str], status: int
) -> None:
    found = running.ask(CHAT, body, **headers)
    assert found[0] == status
    assert set(found[1]["error"]) == {"message", "type", "param", "code"}
    assert running.chat(max_tokens=1)[0] == 200


def test_a_body_that_never_ends_is_refused_early(running: Running) -> None:
    connection = running.connect()
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(100 * 2**20))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_paths_and_methods_that_there_are_not(
    running: Running, method: str, path: str, status: int
) -> None:
    found = running.ask(path, method=method)
    assert (found[0], found[1]["error"]["type"]) == (
        status,
        "not_found_error" if status == 404 else "invalid_request_error",
    )


def test_keys() -> None:
    with server(keys=["one", "zwei ü"]) as running:
        for wrong in ({}, {"Authorization": "Bearer two"}, {"Authorization": "one"}):
            status, found, headers = running.ask("/v1/models", **wrong)
            assert (status, found["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        assert running.ask("/metrics")[0] == 401
        assert running.ask("/v1/models", Authorization="Bearer one")[0] == 200
        assert running.ask("/health")[0] == 200


def test_every_reply_has_an_id(running: Running) -> None:
    assert running.ask("/health", X_Request_Id="mine-1")[2]["x-request-id"] == "mine-1"
    first, second = (running.ask("/nowhere")[2]["x-request-id"] for _ in range(2))
    assert first != second
    assert "\n" not in running.ask("/health", X_Request_Id="a b")[2]["x-request-id"]


def test_other_pages_may_ask_only_where_told(running: Running) -> None:
    origin = "https://page.example"
    assert "access-control-allow-origin" not in running.ask("/health", Origin=origin)[2]
    with server(origins=[origin]) as open_:
        assert open_.ask("/health", Origin=origin)[2]["access-control-allow-origin"] == origin
        other = open_.ask("/health", Origin="https://other.example")[2]
        assert "access-control-allow-origin" not in other


def test_one_line_a_request_tells_which_sampling_ran(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="moac.serve")
    running.chat(max_tokens=3, temperature=0.5)
    running.until(lambda: bool(caplog.messages))
    (line,) = caplog.messages
    assert line.startswith(f"POST {CHAT} status=200 seconds=")
    for part in ("prompt=", "reused=", "answer=3", "finish=length", "temperature 0.5 (explicit)"):
        assert part in line


def test_the_model_s_own_sampling_counts_where_a_request_says_nothing() -> None:
    defaults = {"do_sample": True, "temperature": 30.0}
    with server(model(defaults=defaults)) as running:
        drawn = {str(running.chat(max_tokens=8)[1]["choices"]) for _ in range(3)}
        greedy = {str(running.chat(max_tokens=8, temperature=0)[1]["choices"]) for _ in range(3)}
    assert (len(drawn), len(greedy)) == (3, 1)


def test_seeds_and_choices(running: Running) -> None:
    asked: dict[str, Any] = {"temperature": 2.0, "seed": -7, "n": 3, "max_tokens": 10}
    first, second = (running.chat(**asked)[1] for _ in range(2))
    assert first["choices"] == second["choices"]
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) == 3
    assert check_stream(running.stream(CHAT, {"messages": HI, **asked}), choices=3) == texts
    options = SamplingOptions(temperature=2.0, seed=-7 % 2**63, max_tokens=10)
    alone = model().generate("hi", temperature=2.0, seed=options.seed, max_tokens=10, capacity=512)
    assert texts[0] == alone[0].text


def test_log_probabilities(running: Running) -> None:
    _, found = running.chat(max_tokens=4, logprobs=True, top_logprobs=3)
    content = found["choices"][0]["logprobs"]["content"]
    assert len(content) == found["usage"]["completion_tokens"]
    for one in content:
        assert len(one["top_logprobs"]) == 3
        # greedy: the likeliest is the one that was chosen
        assert one["top_logprobs"][0]["token"] == one["token"]
        assert one["logprob"] <= 0
    assert running.chat(max_tokens=4)[1]["choices"][0]["logprobs"] is None
    _, found, _ = running.ask("/v1/completions", {"prompt": "a", "max_tokens": 4, "logprobs": 2})
    told = found["choices"][0]["logprobs"]
    assert {len(told[name]) for name in ("tokens", "token_logprobs", "text_offset")} == {
        found["usage"]["completion_tokens"]
    }


def test_content_may_be_a_list_of_text_parts(running: Running) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert (
        running.chat(parts, max_tokens=5)[1]["choices"]
        == (running.chat("hi", max_tokens=5)[1]["choices"])
    )


def test_a_second_turn_and_a_shared_system_prompt_are_reused() -> None:
    with server() as running:
        system = {"role": "system", "content": "You are terse. " * 20}
        first = [system, {"role": "user", "content": "Name a fish."}]
        _, cold = running.chat(messages=first, max_tokens=20)
        assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        said = cold["choices"][0]["message"]["content"]
        turn = [
            *first,
            {"role": "assistant", "content": said},
            {"role": "user", "content": "Why?"},
        ]
        _, warm = running.chat(messages=turn, max_tokens=20)
        before = cold["usage"]["prompt_tokens"]
        assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] >= before - 20
        _, other = running.chat(
            messages=[system, {"role": "user", "content": "Else?"}], max_tokens=20
        )
        assert other["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
        fresh = [(turn, warm), ([system, {"role": "user", "content": "Else?"}], other)]
    with server(kept_bytes=0) as running:
        for messages, found in fresh:
            _, wanted = running.chat(messages=messages, max_tokens=20)
            assert wanted["choices"] == found["choices"]
            assert wanted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_client_who_leaves_stops_the_computing() -> None:
    long = "the quick brown fox " * 300
    for stream in (False, True):
        with server(step_tokens=16, kept_bytes=0) as running:
            body = json.dumps(
                {"messages": [{"role": "user", "content": long}], "stream": stream}
            ).encode()
            head = (
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            with socket.create_connection(("127.0.0.1", running.port)) as client:
                client.sendall(head.encode() + body)
                running.until(lambda: running.metric("moac_kv_bytes") > 0)
            running.until(lambda: running.metric("moac_kv_bytes") == 0)
            assert running.metric("moac_sequences_cancelled_total") == 1
            # it ended while the prompt was being read
            read = running.metric("moac_prompt_tokens_read_total")
            assert 0 < read < 1200
            assert running.chat(max_tokens=2)[0] == 200


def test_a_full_queue_says_when_to_come_again() -> None:
    with server(rows=1, waiting=1) as running:
        status, found, headers = running.ask(CHAT, {"messages": HI, "n": 2})
        assert (status, found["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) > 0
        assert running.chat(max_tokens=2)[0] == 200


def test_metrics(running: Running) -> None:
    before = running.metric("moac_answer_tokens_total")
    running.chat(max_tokens=5)
    assert running.metric("moac_answer_tokens_total") == before + 5
    assert running.metric("moac_kv_bytes") == 0
    _, text, _ = running.ask("/metrics")
    assert f'moac_requests_total{{path="{CHAT}",status="200"}}' in text
    assert "moac_time_to_first_token_seconds_bucket" in text
    running.ask("/nowhere/1")
    running.ask("/nowhere/2")
    assert "/nowhere" not in running.ask("/metrics")[1]


def test_a_conversation_that_branches_or_goes_back_answers_as_a_cold_one() -> None:
    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    with server() as warm, server(kept_bytes=0) as cold:
        talk = [{"role": "system", "content": "Be brief. " * 12}, user("One?")]
        turns = [list(talk)]
        for text in ("Two?", "Three?", "Four?"):
            said = warm.chat(messages=talk, max_tokens=25)[1]["choices"][0]["message"]["content"]
            talk = [*talk, {"role": "assistant", "content": said}, user(text)]
            turns.append(list(talk))
        branch = [*turns[1][:-1], user("Else?")]
        for messages in (turns[3], branch, turns[1], turns[3], turns[0], turns[2]):
            found = warm.chat(messages=messages, max_tokens=25)[1]
            wanted = cold.chat(messages=messages, max_tokens=25)[1]
            assert found["choices"] == wanted["choices"]
            assert found["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
            cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert 0 < cached < found["usage"]["prompt_tokens"]


def test_many_clients_at_once_are_answered_as_one() -> None:
    words = ["fox", "hen", "the quick brown fox " * 20, "red", "a " * 90, "key"]
    asked = [
        {"content": word, "max_tokens": 5 + 7 * place, "temperature": place % 2, "seed": place}
        for place, word in enumerate(words * 2)
    ]
    with server(kept_bytes=0) as running:
        alone = [running.chat(**one)[1]["choices"] for one in asked]
        with ThreadPoolExecutor(len(asked)) as pool:
            together = list(pool.map(lambda one: running.chat(**one)[1]["choices"], asked))
    assert together == alone
