"""Cases and texts through the packaged runtime, under any plan: greedy answers and NLL.

A batch is read once. Then its rows are doubled, caches and all: one half answers greedily, the
other is told the right answer, so that an answer's NLL costs no second reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moac.evaluation.case import Case
from moac.evaluation.sessions import Sessions
from moac_runtime.backends.arrays import Array
from moac_runtime.backends.feeding import by_feed
from moac_runtime.backends.session import Feed, Session
from moac_runtime.package.plan import Plan

STEPPED = 50
"""Last tokens of a prompt that go through decode steps, so that retrieval tests those too."""

TEXT_STEPPED = 64
"""Last tokens of a text whose NLL is also taken from decode steps."""

_LOGIT_ROWS = 512  # rows of logits held at once: with a large vocabulary they outweigh the cache


@dataclass(frozen=True, slots=True)
class Reply:
    """`tokens`: the greedy answer, without what ended it. `nll`: mean over the gold value."""

    tokens: tuple[int, ...]
    nll: float


@dataclass(frozen=True, slots=True)
class TextLoss:
    """Mean NLL in nats a token: of a whole text by prefill; of its last tokens in both ways."""

    whole: float
    stepped: float
    same_by_prefill: float
    num_stepped: int


class Runner:
    """A package's weights, to be run under the package's plan or another one."""

    def __init__(self, sessions: Sessions) -> None:
        self._open = sessions.open

    def replies(
        self, plan: Plan, cases: Sequence[Case], *, capacity: int, eos: frozenset[int]
    ) -> list[Reply]:
        """Every case's greedy answer and gold NLL; rows hold `capacity` tokens."""
        session = self._open(plan)
        rows = [session.admit(capacity) for _ in cases]
        logits = _read(session, rows, [case.prompt for case in cases])
        answers = [_Answer(case.limit, eos) for case in cases]
        told = [_Told(case) for case in cases]
        copies = _copied(session, rows)
        _finish(session, torch.cat([logits, logits]), [*rows, *copies], [*answers, *told])
        return [
            Reply(tuple(answer.tokens), sum(gold.losses) / len(gold.losses))
            for answer, gold in zip(answers, told, strict=True)
        ]

    def text_losses(self, plan: Plan, texts: Sequence[Sequence[int]]) -> list[TextLoss]:
        """The NLL of `texts` of equal length; rows hold just that many tokens.

        Decode steps read only the last tokens: a token by token pass over all would take hours.
        """
        length = len(texts[0])
        stepped = min(TEXT_STEPPED, length // 2)
        split = length - 1 - stepped
        session = self._open(plan)
        rows = [session.admit(length) for _ in texts]
        head = _prefill_losses(session, rows, texts, 0, split)
        copies = _copied(session, rows)
        tail = _prefill_losses(session, rows, texts, split, length - 1)
        for row in rows:
            session.release(row)
        steps = []
        for place in range(split, length - 1):
            logits = _decoded(session, copies, [text[place] for text in texts])
            steps.append(_losses(logits, torch.tensor([text[place + 1] for text in texts])))
        by_step = torch.stack(steps, dim=1)
        return [
            TextLoss(
                whole=float(torch.cat([head[row], tail[row]]).mean()),
                stepped=float(by_step[row].mean()),
                same_by_prefill=float(tail[row].mean()),
                num_stepped=stepped,
            )
            for row in range(len(texts))
        ]


def _copied(session: Session, rows: Sequence[int]) -> list[int]:
    """New rows that go on where `rows` stand."""
    return [session.restore(session.snapshot(row)) for row in rows]


def _read(session: Session, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
    """Feed the prompts, their last tokens one by one; logits `[B, V]` after each one's last.

    What all rows have in common in length is one step for all; ragged ends are short.
    """
    shortest = min(len(prompt) for prompt in prompts)
    stepped = min(STEPPED, shortest - 1)
    shared = shortest - stepped
    fed = zip(rows, prompts, strict=True)
    logits = _tensor(session.step([Feed(row, prompt[:shared]) for row, prompt in fed]))
    rest = [prompt[shared : len(prompt) - stepped] for prompt in prompts]
    if any(rest):
        session.step([Feed(row, part, ()) for row, part in zip(rows, rest, strict=True) if part])
    for step in range(-stepped, 0):
        logits = _decoded(session, rows, [prompt[step] for prompt in prompts])
    return logits


def _decoded(session: Session, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Logits `[B, V]` after one token more of each row."""
    feeds = [Feed(row, [token]) for row, token in zip(rows, tokens, strict=True)]
    return _tensor(session.step(feeds))


class _Row(Protocol):
    """A row being continued: `take` its logits `[V]`, return the next token to feed."""

    done: bool

    def take(self, logits: Tensor) -> int: ...


class _Answer:
    """A greedy answer of at most `limit` tokens."""

    def __init__(self, limit: int, eos: frozenset[int]) -> None:
        self._limit, self._eos = limit, eos
        self.tokens: list[int] = []
        self.done = False

    def take(self, logits: Tensor) -> int:
        token = int(logits.argmax())
        if token in self._eos:
            self.done = True
        else:
            self.tokens.append(token)
            self.done = len(self.tokens) == self._limit
        return token


class _Told:
    """The gold answer, fed whatever the model would say; `losses` of its scored tokens."""

    def __init__(self, case: Case) -> None:
        self._gold = case.gold
        self._fed = 0
        self.losses: list[float] = []
        self.done = False

    def take(self, logits: Tensor) -> int:
        token = self._gold.tokens[self._fed]
        if self._fed >= self._gold.scored:
            self.losses.append(float(_losses(logits[None], torch.tensor([token]))[0]))
        self._fed += 1
        self.done = self._fed == len(self._gold.tokens)
        return token


def _finish(
    session: Session, logits: Tensor, numbers: Sequence[int], rows: Sequence[_Row]
) -> None:
    """Continue `rows`, which the session knows by `numbers`, until all are done."""
    while True:
        tokens = [row.take(scores) for row, scores in zip(rows, logits, strict=True)]
        for number, row in zip(numbers, rows, strict=True):
            if row.done:
                session.release(number)
        live = [index for index, row in enumerate(rows) if not row.done]
        if not live:
            return
        rows, numbers = [rows[i] for i in live], [numbers[i] for i in live]
        logits = _decoded(session, numbers, [tokens[i] for i in live])


def _prefill_losses(
    session: Session, rows: Sequence[int], texts: Sequence[Sequence[int]], start: int, stop: int
) -> list[Tensor]:
    """NLL `[stop - start]` per text of the tokens after each of `start..stop`, read in pieces."""
    piece = max(1, _LOGIT_ROWS // len(texts))
    parts: list[list[Tensor]] = [[] for _ in texts]
    for first in range(start, stop, piece):
        last = min(first + piece, stop)
        feeds = [
            Feed(row, text[first:last], range(last - first))
            for row, text in zip(rows, texts, strict=True)
        ]
        logits = by_feed(session.step(feeds), feeds)
        for found, scores, text in zip(parts, logits, texts, strict=True):
            found.append(_losses(_tensor(scores), torch.tensor(text[first + 1 : last + 1])))
    return [torch.cat(found) for found in parts]


def _tensor(logits: Array) -> Tensor:
    return torch.as_tensor(logits)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL `[T]` in nats of `targets` `[T]` under `logits` `[T, V]`."""
    return F.cross_entropy(logits, targets, reduction="none")
