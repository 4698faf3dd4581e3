"""Sequences admitted by the bytes they take, and steps over all of them.

A step is one call of the session: a token of every sequence that writes, and what of the prompts
fits beside them, first come first served.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moac_runtime.backends.arrays import Array
from moac_runtime.backends.session import Feed, Session
from moac_runtime.engine.capacity import rung
from moac_runtime.engine.kept import Kept, KeptCaches
from moac_runtime.engine.logprobs import token_logprobs
from moac_runtime.engine.memory import KvMemory
from moac_runtime.engine.pace import Pace
from moac_runtime.engine.request import Active, Request
from moac_runtime.engine.sampling import Sampler, check_chosen, next_tokens
from moac_runtime.engine.sequence import Answer
from moac_runtime.engine.totals import Totals
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.text.tokenizer import Tokenizer


class QueueFull(MoacError):
    """As many requests wait as may."""


class PromptTooLong(UsageError):
    """A prompt leaves no room for an answer in the largest row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine may take.

    `context`: most tokens of a row. `kv_bytes`: of all rows together, None for no limit.
    `kept_bytes`: of kept caches, beside the rows. `rows`: most at once. `waiting`: most requests
    that wait, None for any number. `step_tokens`: most of a step. `step_s`: seconds that a step
    takes at most, about, while a sequence writes. `fixed_capacity`: rows never grow.
    """

    context: int
    kv_bytes: int | None = None
    kept_bytes: int = 0
    rows: int | None = None
    waiting: int | None = None
    step_tokens: int = 512
    step_s: float = 0.25
    fixed_capacity: bool = False


class Engine:
    """Answers requests on one session; for one thread at a time.

    `dense_bytes(capacity)`: what the model holds of a row by itself.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        limits: Limits,
        *,
        dense_bytes: Callable[[int], int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limits = limits
        self.memory = KvMemory(session, limits.kv_bytes)
        self.kept = KeptCaches(0 if session.fixed_batch else limits.kept_bytes)
        self.totals = Totals()
        self.session = session
        self._tokenizer = tokenizer
        self.dense_bytes = dense_bytes
        self._clock = clock
        self._pace = Pace(limits.step_tokens, limits.step_s)
        self._waiting: deque[Active] = deque()
        self._running: list[Active] = []

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that have one."""
        return len(self._running)

    def row_bytes(self, capacity: int) -> int:
        """Bytes that a row of `capacity` holds; 0 where batches are fixed, which tell none."""
        return 0 if self.session.fixed_batch or not capacity else self.memory.planned(capacity)

    def check(self, request: Request) -> int:
        """The capacity that a request gets. Raises UsageError for one that can never run."""
        most, count = self.limits.context, len(request.tokens)
        if count >= (request.capacity or most):
            raise PromptTooLong(
                f"the prompt has {count} tokens, and prompt and answer together may have "
                f"{request.capacity or most}; shorten the prompt"
            )
        capacity = self._capacity(request)
        self.memory.check(capacity)
        return capacity

    def submit(self, request: Request) -> Active:
        """Let a request wait for its row. Raises as `check`, and QueueFull."""
        capacity = self.check(request)
        if self.limits.waiting is not None and len(self._waiting) >= self.limits.waiting:
            raise QueueFull(f"{len(self._waiting)} requests wait already; try again later")
        grows = request.open_ended and not (self.limits.fixed_capacity or self.session.fixed_batch)
        most = self.limits.context if grows else capacity
        limit = min(request.options.max_tokens, most - len(request.tokens))
        active = Active(
            request,
            Answer(self._tokenizer, request.options.stop, limit=limit),
            Sampler(request.options, request.tokens),
            grows,
            submitted=self._clock(),
        )
        self._waiting.append(active)
        return active

    def cancel(self, active: Active) -> None:
        """End a sequence with what it has, and free its row."""
        if not active.done:
            self.totals.cancelled += 1
            active.answer.finish("interrupted")
            self._leave(active)

    def step(self) -> bool:
        """Admit who fits and take a step; whether there was anything to do."""
        self._admit()
        shares = self._shares()
        if not shares:
            return bool(self._running or self._waiting)  # after one that could not grow ended
        feeds = [
            Feed(_row(active), tokens, None if _to_the_end(active, tokens) else ())
            for active, tokens in shares
        ]
        started = self._clock()
        try:
            self._take(shares, self.session.step(feeds))
        except MoacError as error:  # rows may have been fed a part: none of them can go on
            self._fail([active for active, _ in shares], error)
        self._count(shares, self._clock() - started)
        return True

    # ---- admission

    def _admit(self) -> None:
        if self.session.fixed_batch:
            return self._admit_batch()
        for active in list(self._waiting):
            if self._full() or any(self._stuck(other) for other in self._running):
                return
            if self._prefix_is_being_read(active):
                continue
            if not self._enter(active):
                return

    def _admit_batch(self) -> None:
        """Where batches are fixed: those that wait for the capacity of the first of them."""
        if self._running or not self._waiting:
            return
        capacity = self.check(self._waiting[0].request)
        for active in list(self._waiting):
            if not self._full() and self.check(active.request) == capacity:
                self._enter(active)

    def _full(self) -> bool:
        return self.limits.rows is not None and len(self._running) >= self.limits.rows

    def _enter(self, active: Active) -> bool:
        """Give a request its row; False where the memory has no room for it yet."""
        capacity, found = self._plan(active.request)
        if not self.session.fixed_batch and not self.memory.has_room(capacity):
            return False
        try:
            self._open_row(active, capacity, found)
        except MoacError as error:
            self._fail([active], error)
            return True
        self._waiting.remove(active)
        self._running.append(active)
        active.admitted = self._clock()
        self.totals.reused += active.reused
        self._note_peak()
        return True

    def _plan(self, request: Request) -> tuple[int, Kept | None]:
        """The capacity of a request's row, and the kept cache that it begins with."""
        capacity = self._capacity(request)
        for path in (request.came_from, ((capacity, 0),)):
            found = self.kept.find(request.tokens, path) if request.keep and path else None
            if found is not None:
                return capacity, found
        return capacity, None

    def _capacity(self, request: Request) -> int:
        """A chat that grew does not shrink; else the smallest rung that holds what is planned."""
        least = request.came_from[-1][0] if request.came_from else 0
        return request.capacity or max(least, rung(request.planned, self.limits.context))

    def _open_row(self, active: Active, capacity: int, found: Kept | None) -> None:
        if found is None:
            active.row = self.session.admit(capacity)
            active.path = ((capacity, 0),)
            return
        active.row = self.session.restore(found.snapshot)
        active.fed = active.reused = active.kept = len(found.tokens)
        active.path = found.path
        if capacity > found.snapshot.capacity:
            self._grow(active, capacity)

    def _prefix_is_being_read(self, active: Active) -> bool:
        """Whether another sequence is about to keep a cache that this one can begin with."""
        if not active.request.keep or active.request.came_from or not self.kept.budget:
            return False
        capacity, found = self._plan(active.request)
        held = 0 if found is None else len(found.tokens)
        return any(
            mark < len(active.request.tokens)
            and self.kept.worth_keeping(mark, max(held, other.kept))
            and other.request.tokens[:mark] == active.request.tokens[:mark]
            for other in self._running
            if other.path == ((capacity, 0),) and other.request.keep
            for mark in other.request.marks
            if mark > other.fed
        )

    # ---- growth

    def _stuck(self, active: Active) -> bool:
        """Whether a sequence that may grow has no free slot left for its next token."""
        return not active.reading and active.grows and active.fed >= active.path[-1][0]

    def _make_room(self, active: Active) -> bool:
        """A free slot for the next token; False where there is no memory for it yet."""
        if not self._stuck(active):
            return True
        wanted = rung(active.fed + 1, self.limits.context)
        held = self.session.kv_bytes(active.row)
        if not self.memory.has_room(wanted, instead_of=held):
            return False
        self._grow(active, wanted)
        return True

    def _grow(self, active: Active, capacity: int) -> None:
        self.session.grow(_row(active), capacity)
        active.path = (*active.path, (capacity, active.fed))
        self._note_peak()

    # ---- steps

    def _shares(self) -> list[tuple[Active, Sequence[int]]]:
        """Whose tokens the next step feeds."""
        writing = [one for one in self._running if not one.reading and self._make_room(one)]
        reading = [one for one in self._running if one.reading]
        if not writing and not reading and self._running:
            # Each waits for memory that the others hold: the youngest gives its own back.
            self._end(self._running[-1])
            return []
        shares = [(one, one.next_tokens(1)) for one in writing]
        room = self._pace.room(len(writing))
        for one in reading:
            if room <= 0:
                break
            tokens = one.next_tokens(room)
            shares.append((one, tokens))
            room -= len(tokens)
        return shares

    def _take(self, shares: Sequence[tuple[Active, Sequence[int]]], logits: Array) -> None:
        """Go on from a step's logits, one row for each sequence that has none left to read."""
        for active, tokens in shares:
            active.fed += len(tokens)
        chosen = [active for active, _ in shares if not active.reading]
        for active, _ in shares:
            if active.fed in active.request.marks:
                self._keep(active)
        if chosen:
            self._choose(chosen, logits)

    def _choose(self, active: Sequence[Active], logits: Array) -> None:
        free = [i for i, one in enumerate(active) if one.request.constraint is None]
        tokens = dict(
            zip(free, self._sampled([active[i] for i in free], logits, free), strict=True)
        )
        for place, one in enumerate(active):
            constraint = one.request.constraint
            if constraint is not None:
                allowed = constraint.masked(logits[place : place + 1])
                (tokens[place],) = next_tokens(allowed, [one.sampler])
            self._push(one, tokens[place], logits[place])

    def _sampled(
        self, active: Sequence[Active], logits: Array, places: Sequence[int]
    ) -> list[int]:
        if not active:
            return []
        part = logits if len(places) == len(logits) else logits[list(places)]
        return next_tokens(part, [one.sampler for one in active])

    def _push(self, active: Active, token: int, logits: Array) -> None:
        try:
            check_chosen([token])
        except MoacError as error:
            return self._fail([active], error)
        request = active.request
        if active.first_token is None:
            active.first_token = self._clock()
        if request.logprobs is not None:
            active.logprobs.append(token_logprobs(logits, token, request.logprobs))
        if request.constraint is not None:
            request.constraint.accept(token)
        active.answer.push(token)
        self.totals.chosen += 1
        if active.done:
            self._end(active)

    # ---- the end of a sequence

    def _end(self, active: Active) -> None:
        """Keep what a sequence read and wrote, and free its row."""
        if not active.done:
            active.answer.finish("length")
        self._keep(active)
        self.totals.finished += 1
        self._leave(active)

    def _fail(self, failed: Sequence[Active], error: MoacError) -> None:
        for active in failed:
            active.error = error
            if not active.done:
                active.answer.finish("interrupted")
            self.totals.failed += 1
            self._leave(active)

    def fail_running(self, error: MoacError) -> None:
        """End every sequence that has a row, since none of them can go on."""
        self._fail(list(self._running), error)

    def _leave(self, active: Active) -> None:
        if active in self._waiting:
            self._waiting.remove(active)
        if active in self._running:
            self._running.remove(active)
        if active.row is not None:
            self.session.release(active.row)
            active.row = None
        active.ended = self._clock()

    def _keep(self, active: Active) -> None:
        """Keep a sequence's cache as it stands, where that saves a later one enough."""
        if not active.request.keep or not self.kept.worth_keeping(active.fed, active.kept):
            return
        active.kept = active.fed
        self.kept.put(Kept(active.tokens, active.path, self.session.snapshot(_row(active))))

    # ---- what it took

    def _count(self, shares: Sequence[tuple[Active, Sequence[int]]], seconds: float) -> None:
        written = sum(1 for active, _ in shares if active.fed > len(active.request.tokens))
        read = sum(len(tokens) for _, tokens in shares) - written
        self._pace.took(read, seconds)
        self.totals.count_step(read=read, written=written, seconds=seconds)

    def _note_peak(self) -> None:
        capacities = [one.path[-1][0] for one in self._running]
        dense = sum(map(self.dense_bytes, capacities))
        self.totals.note_peak(self.memory.used, dense, len(capacities))


def _row(active: Active) -> int:
    if active.row is None:
        raise ValueError("the sequence has no row")
    return active.row


def _to_the_end(active: Active, tokens: Sequence[int]) -> bool:
    return active.fed + len(tokens) >= len(active.request.tokens)
