"""Random conversations as clients send them, the same ones for the same seed.

Turns, systems, tools, calls and their results, contents of None and of parts, and text of many
scripts; none spells a control token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

WORDS = (
    "hello", "pass key", "x = 1", "Zürich", "naïve", "e\u0301te\u0301", "Straße", "北京", "日本語",
    "안녕하세요", "שלום", "مرحبا", "नमस्ते", "🙂", "👩\u200d👩\u200d👧", "<b>", "&amp;", '"quoted"',
    "it's", "{{ braces }}", "{% if %}", "back\\slash", "tab\there", "nbsp\u00a0",
    "line\u2028sep", "/think", "/no_think", "<not a token>", "0123456789", "3.14", "a" * 40,
    "...", "zero\u200bwidth", "ﬁ", "Ω",
)  # fmt: skip
ENDS = ("", "", "", "\n", " ", "\n\n", "  ")
TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }
    for name, description, properties, required in (
        (
            "weather",
            "Weather of a city <now> & later, in °C",
            {
                "city": {"type": "string", "description": "Such as Zürich"},
                "unit": {
                    "type": "string",
                    "enum": ["celsius", "fahrenheit"],
                    "default": "celsius",
                },
            },
            ["city"],
        ),
        (
            "search",
            'Finds "documents"',
            {
                "words": {"type": "array", "items": {"type": "string"}, "description": "語"},
                "most": {"type": "integer", "description": "How many"},
            },
            ["words"],
        ),
        ("time", "The time", {}, []),
    )
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """`tools`: None where the model may call none. `last`: whose message is the last."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    answered: bool

    def with_joined_parts(self) -> Conversation:
        """Content in parts as one text, as the runtime takes it."""
        return self._changed(lambda content: "".join(part["text"] for part in content), list)

    def with_words(self) -> Conversation:
        """No content is None."""
        return self._changed(lambda content: "", type(None))

    def has(self, kind: type) -> bool:
        """Whether some content is of that type."""
        return any(isinstance(message["content"], kind) for message in self.messages)

    def _changed(self, change: Any, kind: type) -> Conversation:
        found = []
        for message in self.messages:
            content = message["content"]
            if isinstance(content, kind):
                content = change(content)
            found.append({**message, "content": content})
        return Conversation(found, self.tools, self.answered)


def conversation(seed: int, *, thought: str | None = None) -> Conversation:
    """`thought`: the name under which the template reads an answer's reasoning, None for none."""
    dice = Random(seed)
    tools = dice.sample(TOOLS, dice.randint(1, 3)) if dice.random() < 0.5 else None
    messages: list[dict[str, Any]] = []
    if dice.random() < 0.5:
        messages.append({"role": "system", "content": _content(dice, parts=1)})
    for _ in range(dice.randint(1, 4)):
        messages.append({"role": "user", "content": _content(dice, parts=3)})
        if tools and dice.random() < 0.6:
            messages += _calls(dice, tools, thought)
        messages.append(_answer(dice, thought))
    answered = dice.random() < 0.3
    if not answered:
        messages.pop()
    return Conversation(messages, tools, answered)


def text(dice: Random) -> str:
    """Some words, and perhaps white space around them."""
    words = " ".join(dice.choices(WORDS, k=dice.randint(1, 9)))
    return dice.choice(ENDS) + words + dice.choice(ENDS)


def _content(dice: Random, *, parts: int) -> Any:
    if dice.random() < 0.8:
        return text(dice)
    return [{"type": "text", "text": text(dice)} for _ in range(dice.randint(1, parts))]


def _answer(dice: Random, thought: str | None) -> dict[str, Any]:
    answer: dict[str, Any] = {"role": "assistant", "content": text(dice)}
    if dice.random() < 0.2:  # as a client dumps its own records
        answer |= {"tool_calls": None, "name": None}
    return _thinking(dice, answer, thought)


def _thinking(dice: Random, message: dict[str, Any], thought: str | None) -> dict[str, Any]:
    thinks = thought is not None and dice.random() < 0.4
    return {**message, thought: text(dice)} if thinks and thought else message


def _calls(dice: Random, tools: list[dict[str, Any]], thought: str | None) -> list[dict[str, Any]]:
    """One message that calls functions, and what each of them gave."""
    chosen = [dice.choice(tools)["function"]["name"] for _ in range(dice.choice((1, 1, 2)))]
    calls = [
        {
            "id": "".join(dice.choices("abcXYZ019", k=9)),
            "type": "function",
            "function": {"name": name, "arguments": _arguments(dice)},
        }
        for name in chosen
    ]
    content = dice.choice((None, "", text(dice)))
    asking = {"role": "assistant", "content": content, "tool_calls": calls}
    given = [
        {"role": "tool", "tool_call_id": call["id"], "content": _result(dice)} for call in calls
    ]
    return [_thinking(dice, asking, thought), *given]


def _arguments(dice: Random) -> dict[str, Any]:
    values = (
        text(dice),
        dice.randint(-9, 9),
        0.5,
        None,
        True,
        [text(dice), 1],
        {"deep": text(dice)},
    )
    names = dice.sample(("city", "words", "most", "unit", "Ort"), dice.randint(0, 3))
    return {name: dice.choice(values) for name in names}


def _result(dice: Random) -> str:
    return dice.choice((text(dice), json.dumps({"found": text(dice)}, ensure_ascii=False), "22"))
