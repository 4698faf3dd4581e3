"""The server as real clients meet it: the openai package, curl; tools, schemas, characters."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import openai
import pydantic
import pytest
from engines import model
from servers import NAME, Running, server
from test_generation import scripted_model
from test_serve import CHAT, check_stream
from test_text import byte_tokenizer

HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Calls stand in <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Answer with {"name": function name, "parameters": arguments}.\n{% endif %}'
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
ASKED: list[Any] = [{"role": "user", "content": "How is Rome?"}]


@contextmanager
def client_of(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@contextmanager
def scripted(answer: str, template: str) -> Iterator[Running]:
    """A server whose model answers everything with `answer`."""
    made, _ = scripted_model(answer, capacity=2000, context=2000)
    made.tokenizer = replace(byte_tokenizer(), chat_template=template)
    with server(made, kept_bytes=0) as running:
        yield running


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    with server(model(template=HERMES)) as running:
        yield running


# ---- the openai package


def test_openai_s_client_reads_answers_and_streams(tiny: Running) -> None:
    with client_of(tiny) as client:
        assert [one.id for one in client.models.list()] == [NAME]
        asked: dict[str, Any] = {"model": NAME, "messages": ASKED, "max_tokens": 15}
        whole = client.chat.completions.create(**asked)
        stream = client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(texts) == whole.choices[0].message.content
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        text = client.completions.create(model=NAME, prompt="once", max_tokens=4)
        assert text.usage is not None
        assert text.usage.completion_tokens <= 4


def test_openai_s_client_gets_its_own_errors(tiny: Running) -> None:
    with client_of(tiny) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=NAME, messages=ASKED, frequency_penalty=1)
        assert caught.value.param == "frequency_penalty"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-4", messages=ASKED)


class Ball(pydantic.BaseModel):
    colour: Literal["red", "green"]
    size: Literal[1, 2, 3]
    tags: list[Literal["a", "b"]] = pydantic.Field(max_length=2)


def test_a_schema_is_obeyed(tiny: Running) -> None:
    with client_of(tiny) as client:
        for seed in range(5):
            found = client.chat.completions.parse(
                model=NAME,
                messages=ASKED,
                response_format=Ball,
                temperature=1.5,
                seed=seed,
                max_tokens=200,
            )
            assert isinstance(found.choices[0].message.parsed, Ball)
            assert found.choices[0].finish_reason == "stop"


def test_any_json_object(tiny: Running) -> None:
    status, found = tiny.chat(
        response_format={"type": "json_object"}, max_tokens=1500, temperature=0.7, seed=1
    )
    assert status == 200
    choice = found["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "https://example.com/s"}, {"not": {"const": 1}}]
)
def test_a_schema_that_is_not_served_is_refused(tiny: Running, schema: dict[str, Any]) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, found = tiny.chat(response_format=asked)
    assert (status, found["error"]["param"]) == (400, "response_format")
    assert "the JSON schema is not served" in found["error"]["message"]


# ---- tools


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_must_be_made_is_made(tiny: Running, choice: Any) -> None:
    with client_of(tiny) as client:
        asked: dict[str, Any] = {
            "model": NAME,
            "messages": ASKED,
            "tools": [WEATHER],
            "tool_choice": choice,
            "max_tokens": 100,
        }
        found = client.chat.completions.create(**asked).choices[0]
        assert found.finish_reason == "tool_calls"
        assert found.message.content is None
        assert found.message.tool_calls is not None
        (call,) = found.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


CALLS = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
WANTED = [("weather", {"city": "Rome"}), ("time", {})]


@pytest.mark.parametrize(
    ("template", "answer", "content", "wanted"),
    [
        (HERMES, CALLS, None, WANTED),
        (HERMES, f"I look. \U0001f600\n{CALLS}", "I look. \U0001f600", WANTED),
        (HERMES, "No < call <tool", "No < call <tool", []),
        (HERMES, "<tool_call>\n{broken}\n</tool_call>", "<tool_call>\n{broken}\n</tool_call>", []),
        (HERMES, CALLS[: CALLS.index("</tool")], None, WANTED[:1]),
        (LLAMA3, '{"name": "weather", "parameters": {"city": "Rome"}}', None, WANTED[:1]),
        (LLAMA3, '<|python_tag|>{"name": "time", "parameters": {}}', None, WANTED[1:]),
        (LLAMA3, "It is {warm}.", "It is {warm}.", []),
        (LLAMA3, '{"no": "call"}', '{"no": "call"}', []),
    ],
)
def test_calls_are_read_from_the_answer(
    template: str, answer: str, content: str | None, wanted: list[tuple[str, Any]]
) -> None:
    asked = {"messages": ASKED, "tools": [WEATHER, TIME], "max_tokens": 400}
    with scripted(answer, template) as running:
        _, whole = running.chat(**asked)
        message = whole["choices"][0]["message"]
        calls = message.get("tool_calls", [])
        assert message["content"] == content
        assert [
            (c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls
        ] == (wanted)
        reason = "tool_calls" if wanted else "stop"
        assert whole["choices"][0]["finish_reason"] == reason
        chunks = running.stream(CHAT, asked)
        assert check_stream(chunks) == [content or ""]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        sent = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert [call["index"] for call in sent] == list(range(len(wanted)))
        assert [call["function"] for call in sent] == [call["function"] for call in calls]
        assert chunks[-1]["choices"][0]["finish_reason"] == reason
        with client_of(running) as client:
            stream = client.chat.completions.create(model=NAME, stream=True, **asked)  # type: ignore[call-overload]
            assert list(stream)[-1].choices[0].finish_reason == reason


def test_tools_that_may_not_be_called_are_not_told_of() -> None:
    with scripted("x", HERMES) as running:
        with_tools = running.chat(messages=ASKED, tools=[WEATHER])[1]
        none = running.chat(messages=ASKED, tools=[WEATHER], tool_choice="none")[1]
        without = running.chat(messages=ASKED)[1]
    assert none["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"]
    assert with_tools["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]


def test_tools_are_refused_where_the_template_knows_none() -> None:
    with server() as running:
        status, found = running.chat(tools=[WEATHER])
    assert (status, found["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}])
def test_a_turn_of_calls_comes_back(tiny: Running, content: dict[str, Any]) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    turns = [
        *ASKED,
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "22 degrees"},
    ]
    status, found = tiny.chat(messages=turns, tools=[WEATHER], max_tokens=4)
    assert status == 200
    same, _ = tiny.served.model.tokenizer, None
    text = same.chat(turns)
    assert '"arguments": {"city": "Rome"}' in text
    assert found["usage"]["completion_tokens"] <= 4


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"', "", 5])
def test_arguments_that_are_no_object_name_the_message(tiny: Running, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns = [*ASKED, {"role": "assistant", "tool_calls": [call]}, *ASKED]
    status, found = tiny.chat(messages=turns, tools=[WEATHER])
    assert status == 400
    assert "arguments of a tool call of message 2" in found["error"]["message"]


def test_a_template_s_own_variables() -> None:
    template = "{% if enable_thinking %}think{% endif %}" + HERMES
    with scripted("x", template) as running:
        plain = running.chat(messages=ASKED)[1]["usage"]["prompt_tokens"]
        asked = {"enable_thinking": True}
        thinking = running.chat(messages=ASKED, chat_template_kwargs=asked)[1]["usage"]
    assert thinking["prompt_tokens"] == plain + len("think")


# ---- characters and stop strings


@pytest.mark.parametrize("endpoint", [CHAT, "/v1/completions"])
def test_only_whole_characters_are_sent(endpoint: str) -> None:
    answer = "caf\u00e9 \U0001f600 \u6c49\u5b57 e\u0301 \U0001f469\u200d\U0001f52c"
    asked = {"messages": ASKED, "prompt": "x", "max_tokens": 300}
    with scripted(answer, HERMES) as running:
        pieces = []
        for chunk in running.stream(endpoint, asked):
            choice = chunk["choices"][0]
            pieces.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
    assert "".join(pieces) == answer
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) > 5


def test_no_part_of_a_stop_string_is_sent() -> None:
    asked = {"messages": ASKED, "stop": ["END\u6c49", "zzz"], "max_tokens": 300}
    with scripted("some ENtext EN zz END\u6c49 more", HERMES) as running:
        chunks = running.stream(CHAT, asked)
        assert check_stream(chunks) == ["some ENtext EN zz "]
        sent = ""
        for chunk in chunks:
            sent += chunk["choices"][0]["delta"].get("content") or ""
            assert "some ENtext EN zz ".startswith(sent)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_of_a_stream_hold_every_token() -> None:
    asked = {"messages": ASKED, "logprobs": True, "top_logprobs": 1, "max_tokens": 300}
    with scripted("caf\u00e9 \U0001f600", HERMES) as running:
        chunks = running.stream(CHAT, {**asked, "stream_options": {"include_usage": True}})
    content = [
        one
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["logprobs"]
        for one in choice["logprobs"]["content"]
    ]
    assert len(content) == chunks[-1]["usage"]["completion_tokens"]
    told = bytes(byte for one in content[:-1] for byte in one["bytes"])
    assert told.decode() == "caf\u00e9 \U0001f600"


# ---- curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(tiny: Running) -> None:
    body = json.dumps({"messages": ASKED, "max_tokens": 5, "stream": True})
    url = f"{tiny.url}{CHAT}"
    asked = ["curl", "-sN", url, "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("data: [DONE]\n\n")
    plain = ["curl", "-s", url, "-d", body]  # which says that it sends a form
    done = subprocess.run(plain, capture_output=True, text=True, timeout=60, check=True)
    assert "send application/json" in json.loads(done.stdout)["error"]["message"]
