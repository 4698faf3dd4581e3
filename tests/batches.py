"""Rows that tests admit together and feed side by side, by the contract of every session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from families import VOCAB
from torch import Tensor

from moac_runtime.backends.feeding import by_feed
from moac_runtime.backends.session import Feed, Session

# What two rows, 0 and 1, of 16 tokens cannot be fed, and a part of the sentence about it.
WRONG_FEEDS: list[tuple[Callable[[Session], Any], str]] = [
    (lambda s: s.step([]), "the step feeds no row; give at least one row and its tokens"),
    (lambda s: s.step([Feed(0, [1]), Feed(7, [1])]), "the session has no row 7; name one that"),
    (lambda s: s.step([Feed(1, [1]), Feed(1, [2])]), "row 1 is fed twice in a step; join its"),
    (lambda s: s.step([Feed(0, [1]), Feed(1, [])]), "row 1 is fed no tokens; leave it out"),
    (
        lambda s: s.step([Feed(0, [1]), Feed(1, [1, VOCAB])]),
        f"row 1 is fed token {VOCAB}, expected tokens from 0 to {VOCAB - 1}; encode the text",
    ),
    (lambda s: s.step([Feed(0, [-1]), Feed(1, [1])]), "row 0 is fed token -1, expected"),
    (
        lambda s: s.step([Feed(0, [1], [1]), Feed(1, [1], [])]),
        r"row 0 is fed 1 tokens and asked for logits at \[1\]; give ascending indices from 0 to 0",
    ),
    (lambda s: s.step([Feed(0, [1, 2], [1, 0])]), r"asked for logits at \[1, 0\]; give ascending"),
]


class Batch:
    """`batch` rows of `capacity` tokens of a session; `rows` are their numbers."""

    def __init__(self, session: Any, *, batch: int, capacity: int) -> None:
        self.session: Session = session
        self.rows = [session.admit(capacity) for _ in range(batch)]

    def feed(
        self, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int] | None]
    ) -> list[Tensor]:
        """One step of the rows that get tokens; the wanted logits `[wanted, V]` of every row."""
        feeds = [Feed(*part) for part in zip(self.rows, tokens, wanted, strict=True) if part[1]]
        logits = torch.as_tensor(self.session.step(feeds))
        assert logits.dtype == torch.float32
        parts: Iterator[Tensor] = iter(by_feed(logits, feeds))
        return [next(parts) if part else logits[:0] for part in tokens]

    def last(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits after the last token of each row `[1, V]`, none of a row that got no tokens."""
        return self.feed(tokens, [None] * len(self.rows))

    def each(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits after every token, `[T_b, V]` of each row."""
        return self.feed(tokens, [range(len(part)) for part in tokens])

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """One token a row; logits `[B, V]`."""
        return torch.cat(self.last([[token] for token in tokens]))

    def by_decode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Logits `[B, T, V]` of equally many tokens of each row, fed one by one."""
        return torch.stack([self.decode(step) for step in zip(*tokens, strict=True)], dim=1)

    def keep(self, places: Sequence[int]) -> None:
        """Release the rows but those at `places`, and go on with these in that order."""
        kept = [self.rows[place] for place in places]
        for row in self.rows:
            if row not in kept:
                self.session.release(row)
        self.rows = kept

    def grow(self, capacity: int) -> None:
        """Grow every row that is not so large yet."""
        for row in self.rows:
            if self.session.capacity(row) < capacity:
                self.session.grow(row, capacity)

    @property
    def lengths(self) -> list[int]:
        """Tokens fed to each row."""
        return [self.session.length(row) for row in self.rows]

    def kv_bytes(self) -> int:
        """Bytes of keys and values of all rows."""
        return self.session.kv_bytes()
