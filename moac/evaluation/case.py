"""One question with a known answer, and what counts as having answered it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from moac.calibration.haystack import most_words
from moac.calibration.prompt import PromptFormat
from moac_runtime.errors import UsageError

Score = Callable[[str], float]
"""How right an answer is, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Gold:
    """The tokens of a right answer; those from `scored` on are the value whose NLL counts."""

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True, slots=True)
class Case:
    """`prompt`: tokens up to where the answer starts. `limit`: most tokens of an answer.

    `depth`: where in the prompt's text the answer stands, 0 to 1; None where that is no one place.
    """

    prompt: tuple[int, ...]
    gold: Gold
    limit: int
    score: Score
    depth: float | None

    @property
    def tokens(self) -> int:
        """The most tokens a session of this case holds."""
        return len(self.prompt) + answer_room(self.gold, self.limit)


def answer_room(gold: Gold, limit: int) -> int:
    """Tokens to leave behind the prompt: for an answer of the model's, and for the right one."""
    return max(limit, len(gold.tokens))


def gold_answer(format: PromptFormat, value: str, *, lead: str = "") -> Gold:
    """`lead` and `value` as an answer; only the tokens that reach into `value` are scored."""
    encoded = format.tokenizer(
        lead + value, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    places = encoded["offset_mapping"]
    scored = next(i for i, (_, end) in enumerate(places) if end > len(lead))
    return Gold(tuple(encoded["input_ids"]), scored)


def fitted(
    format: PromptFormat,
    write: Callable[[int], str],
    *,
    task: str,
    budget: int,
    most: int,
    prefix: str = "",
) -> tuple[int, ...]:
    """The prompt of `write(count)` for the largest count up to `most` that `budget` tokens hold.

    `prefix` opens the answer. Raises UsageError where not even `write(1)` fits.
    """

    def render(count: int) -> list[int]:
        return format.encode(format.opening_text(write(count)) + prefix, opens=True)

    count = most_words(render, budget, most)
    if count < 1:
        raise UsageError(
            f"the task {task} leaves {budget} tokens for its prompt, which takes at least "
            f"{len(render(1))}; evaluate at longer lengths"
        )
    return tuple(render(count))


def case_rng(task: str, length: int, seed: int, index: int) -> random.Random:
    """The random numbers of one case: the same for every method and every run."""
    return random.Random(f"{task}/{length}/{seed}/{index}")


def first_integer(answer: str) -> Score:
    """1 where the first integer said is `answer` (MoA's passkey protocol)."""
    return partial(_integer, answer, 0)


def last_integer(answer: str) -> Score:
    """1 where the last integer said is `answer` (LongEval's protocol)."""
    return partial(_integer, answer, -1)


def recall(references: Sequence[str]) -> Score:
    """The share of `references` that the answer contains, case aside (RULER's protocol)."""
    return partial(_recall, tuple(references))


def _integer(answer: str, place: int, text: str) -> float:
    found = re.findall(r"\d+", text)
    return float(bool(found) and found[place] == answer)


def _recall(references: tuple[str, ...], text: str) -> float:
    said = " ".join(text.lower().split())
    return sum(" ".join(r.lower().split()) in said for r in references) / len(references)
