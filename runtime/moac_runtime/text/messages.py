"""Prompts and conversations as callers give them, checked and made plain values for templates.

A message holds `role` and `content`, and may hold `name`, `tool_calls`, `tool_call_id` and its
reasoning under one of three names. A key that is nearly one of these is refused as misspelt; any
other reaches the template, as in transformers, since some templates have fields of their own.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from moac_runtime.errors import MoacError, UsageError
from moac_runtime.package.json_text import parse_json

Message = Mapping[str, Any]

REASONING = ("reasoning_content", "thinking", "reasoning")
_SPEAKERS = ("system", "developer", "user", "assistant")
_TEXTS = ("name", "tool_call_id", *REASONING)
_KNOWN = ("role", "content", "tool_calls", *_TEXTS)
_ALIKE = 0.85  # of two keys: "contents" and "rol" are above it, "tools" and "text" below
_WORDLESS = ("tool_calls", "function_call", *REASONING)  # what an answer may hold and no content
_PART_EXTRAS = ("annotations", "cache_control")  # of a part of content; they change no answer
_PARTS = 'text or a list of {"type": "text", "text": "..."}'


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """`messages` as new dicts of plain JSON values, content always text, keys of None dropped.

    Parts of text become one text without anything between them: templates that take parts write
    them one after another. Raises UsageError naming the message's number and what is wrong.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise UsageError(f"a conversation is a list of messages, got {_kind(messages)}")
    if not messages:
        raise UsageError("the conversation is empty; give at least one message")
    plain = [_message(message, f"message {n}") for n, message in enumerate(messages, start=1)]
    _check_end(plain)
    return plain


def text_of(value: object, what: str) -> str:
    """`value` as exactly a str; UsageError, naming it `what`, where it is no Unicode text."""
    if not isinstance(value, str):
        raise UsageError(f"{what} must be text, got {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} holds bytes that are not UTF-8, or half a surrogate pair (at character "
            f"{error.start}); give it as UTF-8 text"
        ) from None
    return str.__str__(value)


def check_prompt(prompt: object, *, raw: bool) -> None:
    """Raises UsageError where `prompt` is neither a conversation nor text that says something.

    Raw text may be blank, since a model can be asked to go on after a line end, but not empty.
    """
    if isinstance(prompt, Mapping):
        raise UsageError("a conversation is a list of messages; put the message into a list")
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Sequence):
        raise UsageError(f"a prompt is text or a list of messages, got {_kind(prompt)}")
    if isinstance(prompt, str):
        text_of(prompt, "the prompt")
        if not prompt or (not raw and is_blank(prompt)):
            raise UsageError(f"the prompt is {'blank' if prompt else 'empty'}; give some text")


@contextmanager
def named_prompt(number: int, total: int) -> Iterator[None]:
    """What is wrong with prompt `number` of `total` names it, where there are several."""
    try:
        yield
    except MoacError as error:
        if total == 1:
            raise
        raise type(error)(f"prompt {number} of {total}: {error}") from None


def is_blank(text: str) -> bool:
    """Whether `text` shows nothing: white space, control and zero-width characters alone."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} must be a mapping with role and content, got {_kind(message)}")
    said = {_key(key, where): value for key, value in message.items() if value is not None}
    try:
        plain = {key: _plain(value, where, key) for key, value in said.items()}
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply; give plain JSON values") from None
    _check_role(plain, where)
    for key in _TEXTS:
        if key in plain:
            text_of(plain[key], f"{key} of {where}")
    _check_calls(plain, where)
    return {**plain, **_content(plain, where)}


def _key(key: object, where: str) -> str:
    name = text_of(key, f"a key of {where}")
    near = get_close_matches(name.strip().lower(), _KNOWN, n=1, cutoff=_ALIKE)
    if near and name not in _KNOWN:
        raise UsageError(f"{where} has a key {name!r}; did you mean {near[0]!r}?")
    return name


def _check_role(message: Mapping[str, Any], where: str) -> None:
    if "role" not in message:
        raise UsageError(f'{where} has no role; give one, such as "user"')
    if is_blank(text_of(message["role"], f"the role of {where}")):
        raise UsageError(f'the role of {where} is blank; give one, such as "user"')


def _check_calls(message: Mapping[str, Any], where: str) -> None:
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UsageError(f"tool_calls of {where} must be a list of JSON objects")
    for call in calls:
        function = call.get("function")
        _check_arguments(
            (function if isinstance(function, dict) else call).get("arguments"), where
        )


def _check_arguments(arguments: Any, where: str) -> None:
    """Of a call: a JSON object, or one written as text, as clients of servers send it."""
    try:
        found = parse_json(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        found = arguments
    if found is not None and not isinstance(found, dict):
        raise UsageError(
            f"the arguments of a tool call of {where} are no JSON object, got {arguments!r:.60}"
        )


def _content(message: Mapping[str, Any], where: str) -> dict[str, str]:
    """`{"content": text}`, empty where the message may do without."""
    if "content" not in message:
        if message["role"] == "assistant" and any(message.get(key) for key in _WORDLESS):
            return {}
        if message["role"] not in _SPEAKERS and not message.keys() <= set(_KNOWN):
            return {}  # a role of the template's own, with fields of its own
        raise UsageError(f"{where} has no content; give {_PARTS}")
    content = message["content"]
    if isinstance(content, list):
        return {"content": _joined(content, where)}
    if not isinstance(content, str):
        raise UsageError(f"content of {where} is {_kind(content)}; give {_PARTS}")
    return {"content": content}


def _joined(parts: list[Any], where: str) -> str:
    if not parts:
        raise UsageError(f"content of {where} is an empty list; give {_PARTS}")
    return "".join(_part(part, f"part {n} of {where}") for n, part in enumerate(parts, start=1))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise UsageError(f'{where} is {_kind(part)}; give {{"type": "text", "text": "..."}}')
    kind, text = part.get("type"), part.get("text")
    if kind != "text" and isinstance(kind, str):
        raise UsageError(f"{where} is of type {kind!r}, and only text is read; leave it out")
    if kind is None or not isinstance(text, str):
        raise UsageError(f'{where} is no {{"type": "text", "text": "..."}}, got {part!r:.60}')
    for key in part:
        if key not in ("type", "text", *_PART_EXTRAS):
            raise UsageError(f"{where} has a key {key!r} beside its text; leave it out")
    return text


def _check_end(messages: Sequence[Mapping[str, Any]]) -> None:
    """The last message must say something. A tool may return nothing, a call needs no words."""
    last = messages[-1]
    if last["role"] not in _SPEAKERS or any(last.get(key) for key in _WORDLESS):
        return
    if is_blank(last["content"]):
        raise UsageError(
            f"message {len(messages)}, the last of the conversation, is blank; give some text"
        )


def _plain(value: Any, where: str, key: str) -> Any:
    """`value` in the types of JSON themselves: a template must not meet a subclass's methods."""
    if isinstance(value, str):
        return text_of(value, f"{key} of {where}")
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        inner = f"a key in {key} of {where}"
        return {text_of(k, inner): _plain(v, where, key) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, key) for item in value]
    raise UsageError(f"{key} of {where} holds {_kind(value)}; give plain JSON values")


def _kind(value: object) -> str:
    return f"a value of type {type(value).__name__}"
