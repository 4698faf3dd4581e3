"""Held-out evaluation: pass keys in haystacks, and windows of plain text.

Protocol: MoA's passkey task (the first integer the model says), over text no calibration sample
is made of; every second wording is none of calibration's. Chat models answer in a sentence, so
`PASSKEY_ANSWER_TOKENS` are allowed before the integer must be complete.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

from moac.calibration.haystack import Needle, haystack_words, hide, most_words
from moac.calibration.prompt import PromptFormat
from moac.calibration.text import held_out_text
from moac_runtime.errors import UsageError

PASSKEY_ANSWER_TOKENS = 24

Haystack = Literal["filler", "text"]


@dataclass(frozen=True, slots=True)
class Wording:
    """How a case introduces, hides and asks for `{key}`; `seen` by calibration or not."""

    introduction: str
    needle: str
    question: str
    seen: bool


WORDINGS = (
    Wording(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "it. I will quiz you about the important information there.",
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "That is the end of the text. What is the pass key?",
        seen=True,
    ),
    Wording(
        "Somewhere in the pages below the combination of a safe is given. Keep it in mind.",
        "The combination of the safe is {key}. Keep it in mind: {key} opens the safe.",
        "What is the combination of the safe?",
        seen=False,
    ),
    Wording(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "it. I will quiz you about the important information there.",
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "Now tell me: which number is the pass key?",
        seen=True,
    ),
    Wording(
        "One ticket number is mentioned in this text. Look for it while you read.",
        "Your ticket number is {key}. Write it down, the ticket number is {key}.",
        "Which ticket number is mentioned in the text above?",
        seen=False,
    ),
)


@dataclass(frozen=True, slots=True)
class PasskeyCase:
    """A prompt of at most the wanted length; the first integer of a right answer is `answer`.

    `needle_start`, `question_start`: token positions; `depth`: the needle's wanted place, 0 to 1.
    """

    token_ids: tuple[int, ...]
    answer: str
    needle_start: int
    question_start: int
    depth: float
    seen_wording: bool


def passkey_case(
    tokenizer: Any, length: int, depth: float, seed: int, *, haystack: Haystack = "text"
) -> PasskeyCase:
    """A prompt of at most `length` tokens with a pass key at `depth`, through the chat template.

    Even seeds use the classic wording, odd seeds a needle and question calibration never uses.
    `tokenizer` must give offsets (every `tokenizer.json` does). Raises UsageError for too short a
    length.
    """
    format = PromptFormat(tokenizer)
    rng = random.Random(f"passkey/{seed}")
    wording = WORDINGS[seed % len(WORDINGS)]
    key = str(rng.randint(10_000, 99_999))
    needle = wording.needle.format(key=key)
    words = haystack_words(held_out_text(), rng, length, filler=haystack == "filler")

    def text(count: int) -> str:
        body = hide(words[:count], [Needle(needle, depth)])
        return format.opening_text(f"{wording.introduction}\n\n{body}\n\n{wording.question}")

    def render(count: int) -> list[int]:
        return format.encode(text(count), opens=True)

    count = most_words(render, length, length)
    if count < 1:
        raise UsageError(
            f"{length} tokens are too few for a passkey case, which takes at least "
            f"{len(render(1))}; evaluate at longer lengths"
        )
    prompt = text(count)
    return PasskeyCase(
        token_ids=tuple(render(count)),
        answer=key,
        needle_start=_token_at(format, prompt, prompt.index(needle)),
        question_start=_token_at(format, prompt, prompt.rindex(wording.question)),
        depth=depth,
        seen_wording=wording.seen,
    )


def plain_text_windows(
    tokenizer: Any, length: int, count: int, seed: int
) -> list[tuple[int, ...]]:
    """`count` windows of exactly `length` tokens of held-out text, for its NLL.

    At random places; they overlap, evenly spread, only where `count * length` exceeds the text.
    Raises UsageError where one window does.
    """
    text = "\n\n".join(document.text for document in held_out_text())
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = len(tokens) - length
    if room < 0:
        raise UsageError(
            f"the held-out text has {len(tokens)} tokens, fewer than a window of {length}; "
            "evaluate at a shorter length"
        )
    return [tuple(tokens[start : start + length]) for start in _starts(room, length, count, seed)]


def _starts(room: int, length: int, count: int, seed: int) -> list[int]:
    slack = room - (count - 1) * length
    if slack < 0:
        return [i * room // (count - 1) for i in range(count)]
    rng = random.Random(f"windows/{seed}")
    gaps = sorted(rng.randint(0, slack) for _ in range(count))
    return [i * length + gap for i, gap in enumerate(gaps)]


def _token_at(format: PromptFormat, prompt: str, character: int) -> int:
    """The position of the first token that reaches past `character`."""
    special = not format.has_template
    encoded = format.tokenizer(
        prompt, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    ends = (i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > character)
    return next(ends)
