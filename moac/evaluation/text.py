"""The held-out texts by kind, and windows of their tokens that do not overlap.

Origin and licences: `data/README.md`. Calibration reads none of them.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from moac.calibration.text import Document, held_out_text
from moac.calibration.windows import disjoint_starts
from moac_runtime.errors import UsageError

KINDS = ("prose", "code", "documentation")
"""Kinds of text that losses are told apart by."""

MOST_TOKENS = 100_000
"""The most tokens of a kind that one figure reads, one window aside."""

_SHARED = {"fiction": "prose", "science": "prose", "technical": "documentation"}
_FILES = {
    "prose": {
        "workshop": "Workshop on Electronic Texts",
        "opticks": "Opticks, the rest",
    },
    "code": {"brotli": "Brotli", "go": "The Go standard library", "networkx": "NetworkX"},
    "documentation": {"django": "Django", "sqlalchemy": "SQLAlchemy"},
}

Tokens = Sequence[int]


@cache
def held_out(kind: str) -> tuple[Document, ...]:
    """The documents of one of `KINDS`, read where they are first asked for."""
    shared = [found for found in held_out_text() if _SHARED[found.domain] == kind]
    own = [_document(kind, name, title) for name, title in _FILES[kind].items()]
    return (*shared, *own)


def _document(kind: str, name: str, title: str) -> Document:
    file = files(__package__).joinpath("data", kind, f"{name}.txt.xz")
    text = lzma.decompress(file.read_bytes()).decode()
    return Document(title, kind, tuple(text.strip().split("\n\n")))


def kind_tokens(tokenizer: Any, kind: str) -> Tokens:
    """All tokens of a kind, one document after another."""
    text = "\n\n".join(document.text for document in held_out(kind))
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def most_windows(num_tokens: int, length: int) -> int:
    """How many windows of `length` a figure reads at most, of a kind of `num_tokens`.

    Raises UsageError where the kind does not hold even one.
    """
    if length > num_tokens:
        raise UsageError(
            f"a kind of held-out text has {num_tokens} tokens, fewer than a window of {length}; "
            "evaluate nll at a shorter length"
        )
    return max(1, min(MOST_TOKENS, num_tokens) // length)


def windows(tokens: Tokens, length: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """`count` windows of exactly `length` tokens at random places; none overlaps another."""
    starts = disjoint_starts(len(tokens) - length, length, count, seed)
    return [tuple(tokens[start : start + length]) for start in starts]
