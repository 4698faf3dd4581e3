"""One answer: while it is generated, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moac_runtime.engine.stats import Stats
from moac_runtime.text.stream import StopStrings, TextStream
from moac_runtime.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `token_ids` is all the model chose, the ending token or stop string included;
    `text` leaves those out. `reused_tokens`: of the prompt, those that a kept cache held already.
    `capacity`: tokens the session could hold. `stats`: of its batch.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    reused_tokens: int
    finish_reason: FinishReason
    capacity: int
    stats: Stats


class Answer:
    """One row while it is being generated."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, limit: int) -> None:
        self._eos = tokenizer.eos_token_ids
        self._spelling = tokenizer.spelling
        self._stream = TextStream(tokenizer.decode)
        self._stops = StopStrings(stop)
        self._limit = limit
        self._sent = 0
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    def push(self, token: int) -> None:
        """Take the token the model chose; sets `finish_reason` where it is the last."""
        self.token_ids.append(token)
        if token in self._eos:
            return self.finish("stop", ending=self._spelling(token))
        self.text += self._stops.push(self._stream.push(token))
        # A control token is not shown, but a stop string may hold it.
        self.text += self._stops.push(self._spelling(token), hidden=True)
        if self._stops.found:
            return self.finish("stop")
        if len(self.token_ids) >= self._limit:
            return self.finish("length")

    def finish(self, reason: FinishReason, *, ending: str = "") -> None:
        """End the answer: what was held back belongs to it, unless a stop string begins there.

        `ending`: the text of the token that ends it, which is not shown.
        """
        self.text += self._stops.push(self._stream.finish())
        self.text += self._stops.push(ending, hidden=True) + self._stops.finish()
        self.finish_reason = "stop" if self._stops.found else reason

    def take(self) -> str:
        """The text added since the last call."""
        piece, self._sent = self.text[self._sent :], len(self.text)
        return piece
