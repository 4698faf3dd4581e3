"""The thread that runs the engine, and what it tells of each sequence after every step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moac_runtime.engine.engine import Engine, QueueFull
from moac_runtime.engine.logprobs import TokenLogprobs
from moac_runtime.engine.request import Active, Request
from moac_runtime.engine.totals import Totals
from moac_runtime.engine.turn import Turn
from moac_runtime.errors import MoacError
from moac_runtime.host.shortage import shortage

_LESS_MEMORY = "lower --max-kv-bytes or --kept-bytes, or end other programs"


@dataclass(frozen=True, slots=True)
class News:
    """What a step brought for choice `index`: text, tokens, and at the end what it took.

    `error`: why there is no answer.
    """

    index: int
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    end: Turn | None = None
    error: MoacError | None = None

    @property
    def last(self) -> bool:
        """Whether nothing more comes of this choice."""
        return self.end is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class State:
    """The engine as it stood after a step, for other threads to read."""

    totals: Totals
    running: int = 0
    waiting: int = 0
    kv_bytes: int = 0
    kept_bytes: int = 0
    kept_caches: int = 0
    evicted: int = 0


@dataclass(slots=True, eq=False)
class Ticket:
    """A request handed over; `tell` is called in the worker's thread."""

    index: int
    request: Request
    tell: Callable[[News], None]
    active: Active | None = None
    cancelled: bool = False


class EngineThread(threading.Thread):
    """Runs `engine` until closed. Other threads submit, cancel and read `state`."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="moac-engine", daemon=True)
        self._engine = engine
        self._changed = threading.Condition()
        self._inbox: deque[Ticket] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._tickets: list[Ticket] = []
        self._busy = False
        self._closing = False
        self.state = State(Totals())

    def submit(self, requests: Sequence[Request], tell: Callable[[News], None]) -> list[Ticket]:
        """Hand over the choices of one request, all or none. Raises QueueFull."""
        tickets = [Ticket(index, request, tell) for index, request in enumerate(requests)]
        most = self._engine.limits.waiting
        with self._changed:
            waiting = len(self._inbox) + self._engine.waiting
            if self._closing or (most is not None and waiting + len(tickets) > most):
                raise QueueFull(f"{waiting} requests wait already; try again later")
            self._inbox.extend(tickets)
            self._changed.notify()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """End what is left of some sequences before the next step."""
        with self._changed:
            self._cancelled.extend(tickets)
            self._changed.notify()

    def close(self) -> None:
        """End the thread; sequences that are still running end with what they have."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        """Steps while there is something to do."""
        while self._take_in():
            try:
                self._busy = self._engine.step()
            except Exception as error:
                self._engine.fail_running(_told(error))
            self._publish()
        for ticket in self._tickets:
            if ticket.active is not None:
                self._engine.cancel(ticket.active)
        self._publish()

    def _take_in(self) -> bool:
        """Wait for work and take what other threads left; False where the thread is to end."""
        with self._changed:
            while not (self._busy or self._inbox or self._cancelled or self._closing):
                self._changed.wait()
            arrived, self._inbox = self._inbox, deque()
            gone, self._cancelled = self._cancelled, deque()
            closing = self._closing
        for ticket in gone:
            ticket.cancelled = True
            if ticket.active is not None:
                self._engine.cancel(ticket.active)
        for ticket in arrived:
            self._begin(ticket)
        return not closing

    def _begin(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            return
        try:
            ticket.active = self._engine.submit(ticket.request)
        except MoacError as error:
            ticket.tell(News(ticket.index, error=error))
        else:
            self._tickets.append(ticket)

    def _publish(self) -> None:
        engine = self._engine
        self.state = State(
            totals=replace(engine.totals),
            running=engine.running,
            waiting=engine.waiting,
            kv_bytes=engine.memory.used,
            kept_bytes=engine.kept.bytes,
            kept_caches=len(engine.kept),
            evicted=engine.kept.evicted,
        )
        for ticket in self._tickets:
            _tell_news(ticket, engine)
        self._tickets = [one for one in self._tickets if one.active and not one.active.done]


def _tell_news(ticket: Ticket, engine: Engine) -> None:
    active = ticket.active
    if active is None:
        return
    if active.error is not None:
        return ticket.tell(News(ticket.index, error=active.error))
    text = active.answer.take()
    fresh = tuple(active.logprobs[active.counted :])
    active.counted += len(fresh)
    end = Turn.of(active, engine) if active.done else None
    if text or fresh or end:
        ticket.tell(News(ticket.index, text, fresh, end))


def _told(error: Exception) -> MoacError:
    """Any fault of a step as the sentence that its sequences end with."""
    if isinstance(error, MoacError):
        return error
    told = f"{type(error).__name__}: {error}"
    return shortage(error, _LESS_MEMORY) or MoacError(
        f"the step failed ({told}); try again, or serve with --backend torch"
    )
