"""How large a row is made: capacities double from rung to rung, so that rows share kept caches.

A head's span follows from its row's capacity. So what one row has read serves another of the same
capacity alone, and few capacities make that likely.
"""

from __future__ import annotations

LEAST = 512
"""Tokens of the smallest rung."""
OPEN_ENDED = 1024
"""Tokens that an answer of no stated length gets room for at first."""

Path = tuple[tuple[int, int], ...]
"""The capacities a row passed through, each with the tokens it had been fed when it took it."""


def rungs(most: int) -> list[int]:
    """The capacities in use where a row may hold at most `most` tokens, ascending."""
    found = [min(LEAST, most)]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return found


def rung(tokens: int, most: int) -> int:
    """The smallest capacity that holds `tokens`; the largest where none does."""
    return next((size for size in rungs(most) if size >= tokens), most)
