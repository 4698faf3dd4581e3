"""What is asked of the engine, and a sequence while it is being answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moac_runtime.backends.arrays import Array
from moac_runtime.engine.capacity import OPEN_ENDED, Path
from moac_runtime.engine.logprobs import TokenLogprobs
from moac_runtime.engine.sampling import Sampler, SamplingOptions
from moac_runtime.engine.sequence import Answer
from moac_runtime.errors import MoacError


class Constraint(Protocol):
    """What an answer's tokens must obey, such as a grammar."""

    def masked(self, logits: Array) -> Array:
        """`logits` `[1, V]` with every token that may not come next at minus infinity."""

    def accept(self, token: int) -> None:
        """Go on from the token that was chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt as token ids, and how it is to be answered.

    `capacity`: of its row, None for the smallest rung that holds prompt and answer. `open_ended`:
    no length was asked for, so the row starts with room for `OPEN_ENDED` tokens and grows.
    `marks`: ascending counts of prompt tokens after which the cache is worth keeping: the ends of
    messages. `came_from`: the path of the row that this prompt goes on from, where a chat grows
    instead of being read again. `logprobs`: how many likely tokens to tell beside each chosen one,
    None for not even that one. `keep`: whether caches may be kept and reused.
    """

    tokens: tuple[int, ...]
    options: SamplingOptions
    capacity: int | None = None
    open_ended: bool = False
    marks: tuple[int, ...] = ()
    came_from: Path | None = None
    logprobs: int | None = None
    constraint: Constraint | None = None
    keep: bool = True

    @property
    def planned(self) -> int:
        """Tokens of prompt and answer that a row is admitted for."""
        room = OPEN_ENDED if self.open_ended else self.options.max_tokens
        return len(self.tokens) + room


@dataclass(slots=True, eq=False)
class Active:
    """A request on its way: waiting while `row` is None, reading, then writing its answer.

    `fed`: tokens that its row holds or held. `reused`: prompt tokens that came from a kept cache;
    `kept`: tokens of the longest cache of it that is kept.
    `path`: of its row. `grows`: whether the row may outgrow its capacity. `times`: seconds of
    the clock when it was submitted, admitted, gave its first token and ended. `error`: why it
    ended without an answer.
    """

    request: Request
    answer: Answer
    sampler: Sampler
    grows: bool
    submitted: float
    row: int | None = None
    fed: int = 0
    reused: int = 0
    kept: int = 0
    path: Path = ()
    admitted: float | None = None
    first_token: float | None = None
    ended: float | None = None
    error: MoacError | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    counted: int = 0  # of the chosen tokens, those that a reader was told of

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self.answer.finish_reason is not None

    @property
    def reading(self) -> bool:
        """Whether tokens of the prompt are still to be fed."""
        return self.fed < len(self.request.tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens fed so far."""
        return (*self.request.tokens, *self.answer.token_ids)[: self.fed]

    def next_tokens(self, most: int) -> Sequence[int]:
        """What is to be fed next: prompt tokens up to the next mark, or the last chosen one."""
        if not self.reading:
            return self.answer.token_ids[-1:]
        stops = (mark for mark in self.request.marks if mark > self.fed)
        stop = min(next(stops, len(self.request.tokens)), self.fed + most)
        return self.request.tokens[self.fed : stop]
