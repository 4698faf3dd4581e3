"""The text sample shipped with the project, split into calibration and held-out documents.

Origin and licences: `data/README.md`. Nothing that evaluates reads a calibration document, and
nothing that calibrates reads a held-out one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Document:
    """One text: its `title`, its `domain` ("fiction", "technical", "science") and paragraphs."""

    title: str
    domain: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole document, an empty line between paragraphs."""
        return "\n\n".join(self.paragraphs)


@cache
def calibration_text() -> tuple[Document, ...]:
    """The documents calibration samples are made of."""
    return (
        _document("calibration", "alice", "Alice's Adventures in Wonderland", "fiction"),
        _document("calibration", "persuasion", "Persuasion", "fiction"),
        _document("calibration", "python", "The Python Language Reference", "technical"),
    )


@cache
def held_out_text() -> tuple[Document, ...]:
    """Documents held out; none is a calibration document. Evaluation has more of each kind."""
    return (
        _document("heldout", "northanger", "Northanger Abbey", "fiction"),
        _document("heldout", "opticks", "Opticks", "science"),
        _document("heldout", "python", "The Python Debugger and Library", "technical"),
    )


def _document(folder: str, name: str, title: str, domain: str) -> Document:
    file = files(__package__).joinpath("data", folder, f"{name}.txt")
    paragraphs = file.read_text(encoding="utf-8").strip().split("\n\n")
    return Document(title, domain, tuple(paragraphs))


def separated_words(paragraphs: Sequence[str]) -> list[str]:
    """Words that carry the white space after them, so that `"".join` gives the text back."""
    return [word for paragraph in paragraphs for word in re.findall(r"\S+\s*", f"{paragraph}\n\n")]


def running_words(documents: Sequence[Document], rng: random.Random, count: int) -> list[str]:
    """`count` words of running text from a random paragraph on; goes round where text ends."""
    document = rng.choice(documents)
    start = rng.randrange(len(document.paragraphs))
    place = documents.index(document)
    words = separated_words(document.paragraphs[start:])
    for other in [*documents[place + 1 :], *documents[: place + 1]]:
        if len(words) >= count:
            break
        words += separated_words(other.paragraphs)
    return (words * (count // len(words) + 1))[:count]


def ends_clause(word: str) -> bool:
    """Whether a word as `separated_words` gives it closes a clause, a sentence or a paragraph."""
    return "\n" in word or re.search(r"[.!?;:][\"'\u2019\u201d)]*\s*$", word) is not None
