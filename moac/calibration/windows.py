"""Windows of text, at random places where none overlaps another."""

from __future__ import annotations

import random
from typing import Any

from moac.calibration.text import calibration_text, held_out_text
from moac_runtime.errors import UsageError


def plain_text_windows(
    tokenizer: Any, length: int, count: int, seed: int
) -> list[tuple[int, ...]]:
    """`count` windows of exactly `length` tokens of held-out text, none overlapping another.

    Raises UsageError where the text does not hold so many.
    """
    text = "\n\n".join(document.text for document in held_out_text())
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if count * length > len(tokens):
        raise UsageError(
            f"the held-out text has {len(tokens)} tokens, fewer than {count} windows of {length}; "
            "ask for shorter or fewer ones"
        )
    starts = disjoint_starts(len(tokens) - length, length, count, seed)
    return [tuple(tokens[start : start + length]) for start in starts]


def calibration_windows(
    tokenizer: Any, length: int, count: int, seed: int
) -> list[tuple[int, ...]]:
    """At most `count` windows of `length` tokens, shared out over the calibration documents.

    Fewer where a document does not hold its share. Each begins as the tokenizer begins a text.
    """
    documents = calibration_text()
    first = tokenizer("a")["input_ids"][:1]
    opening = first if first == [tokenizer.bos_token_id] else []
    own, windows = length - len(opening), []
    for place, document in enumerate(documents):
        tokens = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        share = min(len(range(place, count, len(documents))), len(tokens) // own)
        starts = disjoint_starts(len(tokens) - own, own, share, seed) if share else []
        windows += [(*opening, *tokens[start : start + own]) for start in starts]
    return windows


def disjoint_starts(room: int, length: int, count: int, seed: int) -> list[int]:
    """Where `count` windows of `length` start, from 0 to `room`, in order, none in another."""
    slack = room - (count - 1) * length
    rng = random.Random(f"windows/{seed}")
    gaps = sorted(rng.randint(0, slack) for _ in range(count))
    return [i * length + gap for i, gap in enumerate(gaps)]
