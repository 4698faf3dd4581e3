"""Windows of held-out text, at random places where none overlaps another."""

from __future__ import annotations

import random
from typing import Any

from moac.calibration.text import held_out_text
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


def disjoint_starts(room: int, length: int, count: int, seed: int) -> list[int]:
    """Where `count` windows of `length` start, from 0 to `room`, in order, none in another."""
    slack = room - (count - 1) * length
    rng = random.Random(f"windows/{seed}")
    gaps = sorted(rng.randint(0, slack) for _ in range(count))
    return [i * length + gap for i, gap in enumerate(gaps)]
