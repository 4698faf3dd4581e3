"""Conversations as callers give them: what is taken, what is refused, in which words."""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum
from types import MappingProxyType
from typing import Any

import pytest

from moac_runtime.errors import UsageError
from moac_runtime.text.messages import check_prompt, is_blank, plain_messages

TEXT = {"type": "text", "text": "hi"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


class Role(str, Enum):  # noqa: UP042 - the kind whose str() is not its value
    USER = "user"


def user(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **others}


def content_of(content: Any) -> Any:
    return plain_messages([user(content)])[0]["content"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hi", "hi"),
        ([TEXT], "hi"),
        ((MappingProxyType(TEXT),), "hi"),
        ([TEXT, {"type": "text", "text": "!\n"}, TEXT], "hi!\nhi"),
        ([{**TEXT, "cache_control": {"type": "ephemeral"}, "annotations": []}], "hi"),
        ([{"type": "text", "text": ""}, TEXT], "hi"),
    ],
)
def test_parts_become_one_text(content: Any, text: str) -> None:
    assert content_of(content) == text


def test_messages_may_be_any_sequence_of_any_mappings() -> None:
    given = (MappingProxyType(user("hi")), OrderedDict(user("so", name="Ann")))
    assert plain_messages(given) == [user("hi"), user("so", name="Ann")]


def test_values_lose_the_types_that_templates_would_show() -> None:
    (plain,) = plain_messages([{"role": Role.USER, "content": "hi", "tags": (1, True, None, 0.5)}])
    assert plain == {"role": "user", "content": "hi", "tags": [1, True, None, 0.5]}
    assert type(plain["role"]) is str


def test_keys_of_none_are_dropped_and_unknown_ones_kept() -> None:
    given = user("hi", name=None, refusal=None, tools=["a"], documents=[{"title": "b"}])
    assert plain_messages([given]) == [user("hi", tools=["a"], documents=[{"title": "b"}])]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "reasoning_content": "so"},
        {"role": "assistant", "function_call": {"name": "add", "arguments": "{}"}},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "tool", "tool_results": [{"output": "3"}]},
        {"role": "narrator", "content": "A storm."},
    ],
)
def test_what_may_do_without_words(message: dict[str, Any]) -> None:
    kept = {key: value for key, value in message.items() if value is not None}
    assert plain_messages([user("hi"), message]) == [user("hi"), kept]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (user([TEXT, IMAGE]), "part 2 of message 2 is of type 'image_url', and only text is read"),
        (user([{"type": "input_audio"}]), "part 1 of message 2 is of type 'input_audio'"),
        (user(["hi"]), "part 1 of message 2 is a value of type str"),
        (user([{"text": "hi"}]), "part 1 of message 2 is no"),
        (user([{"type": "text"}]), "part 1 of message 2 is no"),
        (user([{"type": "text", "text": 7}]), "part 1 of message 2 is no"),
        (user([{**TEXT, "image_url": "x"}]), "part 1 of message 2 has a key 'image_url' beside"),
        (user([]), "content of message 2 is an empty list"),
        (user(TEXT), "content of message 2 is a value of type dict; give text or a list of"),
        (user(7), "content of message 2 is a value of type int"),
        (user(True), "content of message 2 is a value of type bool"),
        (user(b"hi"), "content of message 2 holds a value of type bytes"),
        (user([TEXT, {1, 2}]), "content of message 2 holds a value of type set"),
        (user(None), "message 2 has no content"),
        ({"role": "user"}, "message 2 has no content"),
        ({"role": "user", "text": "hi"}, "message 2 has no content"),
        ({"role": "assistant", "tool_calls": []}, "message 2 has no content"),
        ({"role": "user", "contents": "hi"}, "key 'contents'; did you mean 'content'?"),
        ({"Role": "user", "content": "hi"}, "message 2 has a key 'Role'; did you mean 'role'?"),
        ({"role ": "user", "content": "hi"}, "did you mean 'role'?"),
        (user("hi", toolCalls=[CALL]), "did you mean 'tool_calls'?"),
        (user("hi", reasoning_contents="x"), "did you mean 'reasoning_content'?"),
        ({"content": "hi"}, "message 2 has no role"),
        ({"role": None, "content": "hi"}, "message 2 has no role"),
        ({"role": 7, "content": "hi"}, "the role of message 2 must be text, got a value of type"),
        ({"role": " ", "content": "hi"}, "the role of message 2 is blank"),
        (user("hi", name=7), "name of message 2 must be text"),
        (user("hi", reasoning=["so"]), "reasoning of message 2 must be text"),
        (user("hi", tool_calls={"name": "add"}), "tool_calls of message 2 must be a list"),
        (user("hi", tool_calls=["add"]), "tool_calls of message 2 must be a list"),
        (user("hi", tags={1: 2}), "a key in tags of message 2 must be text"),
        ({1: 2, **user("hi")}, "a key of message 2 must be text"),
        (user("a\ud800"), r"content of message 2 holds .* half a surrogate pair .* character 1"),
        (user([{**TEXT, "text": "\udcff"}]), "content of message 2 holds bytes that are not"),
        (user("hi", tags=["\udcff"]), "tags of message 2 holds bytes that are not UTF-8"),
        (user("hi", **{"\udcff": 1}), "a key of message 2 holds bytes that are not UTF-8"),
        ("hello", "message 2 must be a mapping with role and content, got a value of type str"),
        (None, "message 2 must be a mapping with role and content, got a value of type NoneType"),
        (user(""), "message 2, the last of the conversation, is blank"),
        (user(" \n\u200b\ufeff\x00"), "message 2, the last of the conversation, is blank"),
        (user([{**TEXT, "text": " "}, {**TEXT, "text": ""}]), "is blank"),
        (
            {"role": "assistant", "content": ""},
            "message 2, the last of the conversation, is blank",
        ),
    ],
)
def test_what_is_refused_and_how(message: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        plain_messages([user("first"), message])
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith(".")


def test_values_that_hold_themselves_are_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UsageError, match="message 1 is nested too deeply"):
        plain_messages([user("hi", tags=endless)])


@pytest.mark.parametrize("value", ["hi", b"hi", {"role": "user"}, None, 7, {"a", "b"}])
def test_what_is_no_list_of_messages_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="a conversation is a list of messages, got"):
        plain_messages(value)


def test_an_earlier_message_may_be_empty() -> None:
    talk = [{"role": "system", "content": ""}, {"role": "assistant", "content": ""}, user("hi")]
    assert plain_messages(talk) == talk


@pytest.mark.parametrize(
    "text", ["", " ", "\r\n", "\ufeff", "\u200b\u2060\u00ad", "\x00", "\u3000"]
)
def test_blank_text(text: str) -> None:
    assert is_blank(text)
    with pytest.raises(UsageError, match="the prompt is"):
        check_prompt(text, raw=False)


@pytest.mark.parametrize("text", [".", "\u200bx", "\U0001f468\u200d\U0001f469", "\u0301", "0"])
def test_text_that_says_something(text: str) -> None:
    assert not is_blank(text)
    check_prompt(text, raw=False)
