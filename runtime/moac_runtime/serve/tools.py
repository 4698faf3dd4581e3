"""Functions a model may call: as a request gives them, and as an answer's text calls them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from moac_runtime.package.json_text import parse_json
from moac_runtime.serve.errors import ApiError, wrong
from moac_runtime.serve.fields import BodyFields

Delta = dict[str, Any]
Style = Literal["hermes", "llama3"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
ARGUMENTS: dict[Style, str] = {"hermes": "arguments", "llama3": "parameters"}
"""What a call's arguments are named in the text that the model writes."""


@dataclass(frozen=True, slots=True)
class Tools:
    """`given`: the tools as they came. `must`: the names of those of which one must be called,
    none where the model may choose.
    """

    given: tuple[dict[str, Any], ...]
    must: tuple[str, ...] = ()

    def parameters(self, name: str) -> dict[str, Any]:
        """The JSON schema of a function's arguments."""
        found = next(one for one in self.given if one["function"]["name"] == name)
        schema: dict[str, Any] = found["function"].get("parameters") or {"type": "object"}
        return schema

    def call_schema(self, style: Style) -> dict[str, Any]:
        """The JSON schema of a call of one of those that must be called."""
        return {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": name},
                        ARGUMENTS[style]: self.parameters(name),
                    },
                    "required": ["name", ARGUMENTS[style]],
                    "additionalProperties": False,
                }
                for name in self.must
            ]
        }


def read_tools(fields: BodyFields) -> Tools | None:
    """The tools that a request offers, None where it offers none or forbids them.

    Raises ApiError.
    """
    given = fields.items("tools") or []
    for number, tool in enumerate(given):
        _check_tool(tool, f"tools[{number}]")
    names = tuple(tool["function"]["name"] for tool in given)
    choice = fields.any("tool_choice")
    if choice in (None, "auto") or (choice == "none" and not given):
        return Tools(tuple(given)) if given else None
    if not given:
        raise wrong("tool_choice", "tool_choice needs tools; give some, or leave it out")
    if choice == "none":
        return None
    if choice == "required":
        return Tools(tuple(given), must=names)
    return Tools(tuple(given), must=(_chosen(choice, names),))


def style_of(template: str) -> Style:
    """How the models of a chat template write calls."""
    return "hermes" if _OPEN in template else "llama3"


def _check_tool(tool: Any, where: str) -> None:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise wrong("tools", f'{where} must be {{"type": "function", "function": {{...}}}}')
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong("tools", f"{where} has no function with a name; give one")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise wrong("tools", f"the parameters of {where} must be a JSON schema")


def _chosen(choice: Any, names: Sequence[str]) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise wrong(
            "tool_choice",
            'tool_choice must be "auto", "none", "required" or a function of tools, '
            f"got {choice!r:.80}",
        )
    return str(name)


# ---- an answer's text as deltas


class DeltaReader(Protocol):
    """Turns an answer's text into deltas of a message."""

    def push(self, text: str) -> list[Delta]:
        """What `text` adds."""

    def finish(self) -> list[Delta]:
        """What was held back."""

    @property
    def called(self) -> bool:
        """Whether a tool was called."""


class PlainText:
    """An answer without tools."""

    called = False

    def push(self, text: str) -> list[Delta]:
        """All of it."""
        return [{"content": text}] if text else []

    def finish(self) -> list[Delta]:
        """Nothing is held back."""
        return []


class HermesCalls:
    """Calls as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen).

    `inside`: whether the prompt ended with an opened call.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self._text = ""
        self._inside = inside
        self._after_call = False
        self._calls = 0

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._calls > 0

    def push(self, text: str) -> list[Delta]:
        """Content as it comes, and calls once they are whole."""
        self._text += text
        found: list[Delta] = []
        while True:
            mark = _CLOSE if self._inside else _OPEN
            at = self._text.find(mark)
            if at < 0:
                break
            before, self._text = self._text[:at], self._text[at + len(mark) :]
            found += self._call(before, mark) if self._inside else self._show(before.rstrip())
            self._inside = not self._inside
        if not self._inside:  # white space waits, since it may stand before a call
            ready = self._text[: len(self._text) - self._begun()].rstrip()
            self._text = self._text[len(ready) :]
            found += self._show(ready)
        return found

    def finish(self) -> list[Delta]:
        """A call that was not closed counts where it is whole; else it is text."""
        rest, self._text = self._text, ""
        return self._call(rest, "") if self._inside else self._show(rest)

    def _call(self, text: str, mark: str) -> list[Delta]:
        call = read_call(text, "hermes")
        if call is None:
            return self._show(_OPEN + text + mark)
        self._calls += 1
        self._after_call = True
        return [_call_delta(self._calls - 1, *call)]

    def _show(self, text: str) -> list[Delta]:
        """Content; white space right behind a call is none."""
        shown = text.lstrip() if self._after_call else text
        self._after_call = self._after_call and not shown
        return _shown(shown)

    def _begun(self) -> int:
        """Characters at the end that may begin a call."""
        longest = min(len(self._text), len(_OPEN) - 1)
        return next((n for n in range(longest, 0, -1) if _OPEN.startswith(self._text[-n:])), 0)


class Llama3Calls:
    """A call as an answer that is JSON alone: `{"name": ..., "parameters": {...}}` (Llama 3)."""

    def __init__(self) -> None:
        self._text = ""
        self._plain = False
        self.called = False

    def push(self, text: str) -> list[Delta]:
        """Text as it comes unless it begins as JSON does, which waits for its end."""
        if self._plain:
            return _shown(text)
        self._text += text
        begun = self._text.lstrip()
        if not begun or begun[0] in "{[" or _PYTHON_TAG.startswith(begun[: len(_PYTHON_TAG)]):
            return []
        self._plain, held = True, self._text
        return _shown(held)

    def finish(self) -> list[Delta]:
        """The calls where all of it is calls, else the text."""
        if self._plain:
            return []
        parts = self._text.strip().removeprefix(_PYTHON_TAG).split(";")
        calls = [read_call(self._text.strip().removeprefix(_PYTHON_TAG), "llama3")]
        if calls == [None]:
            calls = [read_call(part, "llama3") for part in parts]
        whole = [call for call in calls if call is not None]
        if len(whole) < len(calls):
            return _shown(self._text)
        self.called = True
        return [_call_delta(index, *call) for index, call in enumerate(whole)]


def reader_of(tools: Tools | None, style: Style) -> DeltaReader:
    """What reads an answer to a request with these tools."""
    if tools is None:
        return PlainText()
    return HermesCalls(inside=bool(tools.must)) if style == "hermes" else Llama3Calls()


def opening(tools: Tools | None, style: Style) -> str:
    """What is written before an answer that must be a call, as a model would begin it."""
    return f"{_OPEN}\n" if tools is not None and tools.must and style == "hermes" else ""


def read_call(text: str, style: Style) -> tuple[str, str] | None:
    """Name and arguments, as JSON text, of a call; None where `text` is none."""
    try:
        found = parse_json(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    other: Style = "llama3" if style == "hermes" else "hermes"
    arguments = found.get(ARGUMENTS[style], found.get(ARGUMENTS[other], {}))
    if not isinstance(arguments, dict):
        return None
    return found["name"], json.dumps(arguments, ensure_ascii=False)


def unrendered() -> ApiError:
    """What is said where a package's template cannot tell its model of tools."""
    return ApiError(
        400,
        "tools are not served: this package's chat template does not write them; leave them out",
        param="tools",
        code="unsupported_parameter",
    )


def _shown(text: str) -> list[Delta]:
    return [{"content": text}] if text else []


def _call_delta(index: int, name: str, arguments: str) -> Delta:
    call = {
        "index": index,
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    return {"tool_calls": [call]}
