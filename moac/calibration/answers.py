"""Answers by the dense model: greedy, one prefill a sample, the cache kept between questions."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moac.calibration.prompt import PromptFormat
from moac_runtime.backends.session import Feed, Session


class AnswersModel(Protocol):
    """A model that reads, nothing dropped: `session` is one without rows."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    def session(self) -> Session: ...


class DenseReader:
    """The checkpoint reading one sequence: feed it tokens, then let it answer.

    `tokens` holds everything fed and answered so far, at most `capacity`, on one KV cache, so
    that a haystack is read once however many questions follow it.
    """

    def __init__(self, model: AnswersModel, format: PromptFormat, *, capacity: int) -> None:
        self.tokens: list[int] = []
        self._session = model.session()
        self._row = self._session.admit(capacity)
        self._format = format
        self._stops = stop_tokens(model, format)
        self._unread: list[int] = []
        self._scores: Tensor | None = None

    def feed(self, ids: list[int]) -> None:
        """Append `ids` to the sequence."""
        self.tokens += ids
        self._unread += ids

    def answer(self, limit: int, *, sentence: bool = False) -> list[int]:
        """The model's greedy answer, 1 to `limit` tokens, without the token that ended it.

        Ends at an end-of-sequence token; at a line end where there is no chat template; with
        `sentence`, at a line end or behind the first sentence. The first token is never an end,
        so that an answer always carries loss.
        """
        reply: list[int] = []
        line_ends = sentence or not self._format.has_template
        while len(reply) < limit:
            token = self._next(allow_stop=bool(reply))
            text = self._format.decode([token])
            if token in self._stops or (reply and "\n" in text and line_ends):
                break
            reply.append(token)
            self.feed([token])
            if sentence and text.rstrip().endswith((".", "!", "?")):
                break
        return reply

    def _next(self, *, allow_stop: bool) -> int:
        if self._unread:
            self._read()
        scores = self._scores
        if scores is None:
            raise ValueError("feed at least one token before asking for an answer")
        if not allow_stop:
            scores = scores.clone()
            scores[list(self._stops)] = -torch.inf
        return int(scores.argmax())

    def _read(self) -> None:
        scores = self._session.step([Feed(self._row, self._unread)])
        self._scores, self._unread = torch.as_tensor(scores)[0], []


def stop_tokens(model: AnswersModel, format: PromptFormat) -> frozenset[int]:
    """Every end-of-sequence id of the checkpoint: its generation config's and its tokenizer's."""
    own = format.tokenizer.eos_token_id
    return frozenset(model.eos_token_ids) | ({own} if own is not None else frozenset())
