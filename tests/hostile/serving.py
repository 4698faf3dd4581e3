"""Requests to the server: bodies and headers, answered by a tiny model."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from engines import model
from guard import Broken, Target
from mutate import hostile_bytes, hostile_json

from moac_runtime.serve.app import build_app
from moac_runtime.serve.log import LOG
from moac_runtime.serve.served import Served

_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0}, "b": {"enum": ["x", "y"]}},
            "required": ["a"],
        },
    },
}
_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "s",
        "schema": {
            "type": "object",
            "properties": {
                "a": {"type": "string", "pattern": "[a-z]{1,9}", "maxLength": 9},
                "b": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
                "c": {"$ref": "#/$defs/d"},
            },
            "$defs": {"d": {"anyOf": [{"type": "null"}, {"const": 1}]}},
        },
    },
}
_USER = {"role": "user", "content": "What is the pass key?"}
_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "<|im_end|> hi"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        ],
    },
    {"role": "tool", "content": "2", "tool_call_id": "1"},
    _USER,
]
_SAMPLING = {
    "max_tokens": 2,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
}
_SAMPLING |= {"repetition_penalty": 1.1, "stop": ["x", "END"], "n": 1, "stream": False}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"model": "tiny", "messages": [_USER], **_SAMPLING}),
    (CHAT, {"messages": _TALK, "max_tokens": 1, "tools": [_TOOL], "tool_choice": "auto"}),
    (CHAT, {"messages": [_USER], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}),
    (
        CHAT,
        {
            "messages": [_USER],
            "max_tokens": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    (CHAT, {"messages": [_USER], "max_tokens": 2, "response_format": _SCHEMA}),
    (
        CHAT,
        {"messages": [_USER], "max_tokens": 1, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    (TEXT, {"prompt": "The key", **_SAMPLING}),
    (TEXT, {"prompt": ["a", "b"], "max_tokens": 1, "logprobs": 1}),
    (TEXT, {"prompt": [[1, 2], [3]], "max_tokens": 1, "stream": True}),
]
_TEXTS = [(path, json.dumps(body)) for path, body in _BODIES]
_HEADERS = (
    b"content-type",
    b"content-length",
    b"authorization",
    b"x-request-id",
    b"host",
    b"accept",
)
_VALUES = (
    b"",
    b"application/json",
    b"text/plain",
    b"9" * 5000,
    b"-1",
    b"\xff\xfe",
    b"Bearer \xe9",
)
_VALUES += (b"\xb2\xb3", b"1e3", b"application/json; charset=utf-16", b"a\nb", b"Bearer key")
_ANSWERED_S = 30


def request(folder: Path) -> Target:
    """A request, as the server hands it to the application."""
    made = model()
    served = Served(made, made.engine(kept_bytes=2**22, waiting=64, kv_bytes=2**26), "tiny", ())
    app = build_app(served)
    served.thread.start()
    faults = _Faults()
    LOG.addHandler(faults)
    LOG.propagate = False

    def make(rng: Random) -> bytes:
        path, text = rng.choice(_TEXTS)
        body = hostile_json(rng, text).encode("utf-8", "surrogatepass")
        body = hostile_bytes(rng, body) if rng.random() < 0.1 else body
        headers = [
            (rng.choice(_HEADERS), rng.choice(_VALUES))
            for _ in range(rng.randint(1, 3) if rng.random() < 0.1 else 0)
        ]
        return _told(path, headers, body)

    def ran(data: bytes) -> None:
        faults.texts.clear()
        told = json.loads(data)
        headers = [(bytes.fromhex(k), bytes.fromhex(v)) for k, v in told["headers"]]
        status, reply = asyncio.run(
            _asked(app, told["path"], headers, bytes.fromhex(told["body"]))
        )
        _check_reply(status, reply)
        if faults.texts or not served.thread.is_alive():
            raise Broken(f"the server noted {faults.texts[:1]}")

    return Target(_told(_TEXTS[0][0], [], _TEXTS[0][1].encode()), make, ran)


def _told(path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    told = [[name.hex(), value.hex()] for name, value in headers]
    return json.dumps({"path": path, "headers": told, "body": body.hex()}).encode()


class _Faults(logging.Handler):
    """What the server's log tells of its own faults."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(logging.Formatter().format(record)[-2000:])


async def _asked(
    app: Any, path: str, headers: list[tuple[bytes, bytes]], body: bytes
) -> tuple[int, bytes]:
    """Status and body of the reply."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
    }
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    status, found = 0, b""

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await asyncio.sleep(_ANSWERED_S)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, found
        status = message.get("status", status)
        found += message.get("body", b"")

    await app(scope, receive, send)
    return status, found


def _check_reply(status: int, reply: bytes) -> None:
    """A refusal is JSON as OpenAI's, and of a client's fault."""
    if status == 200:
        return
    if not 400 <= status < 500:
        raise Broken(f"it answered {status}: {reply[:300]!r}")
    error = json.loads(reply)["error"]
    if "\n" in error["message"] or not error["message"]:
        raise Broken(f"no sentence: {error['message'][:300]!r}")


PARSERS: dict[str, Callable[[Path], Target]] = {"request": request}
