"""Haystacks: running text or filler with needles at chosen depths, cut to a number of tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moac.calibration.text import Document, ends_clause, running_words, separated_words

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)


@dataclass(frozen=True, slots=True)
class Needle:
    """A sentence to hide; `depth` is the share of the haystack before it, 0 to 1."""

    text: str
    depth: float


def filler_words(count: int) -> list[str]:
    """`count` words of the passkey task's classic filler."""
    words = separated_words([FILLER.replace("\n", " ")])
    words[-1] = words[-1].strip() + " "
    return (words * (count // len(words) + 1))[:count]


def haystack_words(
    documents: Sequence[Document], rng: random.Random, count: int, *, filler: bool
) -> list[str]:
    """`count` words of filler, or of running text from `documents`."""
    return filler_words(count) if filler else running_words(documents, rng, count)


def hide(words: Sequence[str], needles: Sequence[Needle]) -> str:
    """The text of `words` with each needle put behind the clause end nearest to its depth."""
    places = sorted((_place(words, needle.depth), needle.text) for needle in needles)
    parts: list[str] = []
    done = 0
    for place, text in places:
        parts += [*words[done:place], text, " "]
        done = place
    return "".join([*parts, *words[done:]]).rstrip()


def _place(words: Sequence[str], depth: float) -> int:
    """The sentence or clause end nearest to `depth`, as a count of words before the needle."""
    wanted = depth * len(words)
    ends = [0, *(i for i, word in enumerate(words, start=1) if ends_clause(word)), len(words)]
    return min(ends, key=lambda end: abs(end - wanted))


def most_words(render: Callable[[int], Sequence[int]], budget: int, limit: int) -> int:
    """The largest word count up to `limit` whose rendering holds at most `budget` tokens, or -1.

    Tokens grow almost, not strictly, with words; what is returned was rendered and fits.
    """
    low, high, best = 0, limit, -1
    while low <= high:
        middle = (low + high) // 2
        if len(render(middle)) <= budget:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best
