"""The time left of planned work, by what it has taken so far.

Work is planned as amounts by stage and kind. A kind counts at a guessed speed until some of it has
run, then at the speed that it runs at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import RLock

Amounts = Mapping[str, float]

SETTLING = 60.0
"""Seconds after which the time told never grows by more than `MOST_GROWTH`."""

MOST_GROWTH = 1.25

_UNSURE = 0.25  # what has not run yet counts so much more: a time that falls disappoints nobody
_OVERDUE = 0.1  # a step past its time takes so much of it again


@dataclass(slots=True)
class _Speed:
    """Seconds of a kind that has run, and of how much. `guess`: seconds a unit, before."""

    guess: float | None = None
    seconds: float = 0.0
    amount: float = 0.0

    @property
    def measured(self) -> float | None:
        return self.seconds / self.amount if self.amount > 0 else None


@dataclass(slots=True)
class _Begun:
    kind: str
    amount: float
    since: float


@dataclass(slots=True)
class TimeLeft:
    """Seconds left of `work[stage][kind]`, amounts in the units of `guesses` (seconds a unit).

    Work without guesses has no time left until some of each of its kinds has run. Another thread
    may ask while the work goes on.
    """

    work: Mapping[str, Amounts]
    guesses: Amounts = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    _left: dict[str, dict[str, float]] = field(init=False)
    _speeds: dict[str, _Speed] = field(init=False)
    _running: _Begun | None = field(init=False, default=None)
    _stage: str | None = field(init=False, default=None)
    _started: float = field(init=False)
    _lock: RLock = field(init=False, default_factory=RLock)

    def __post_init__(self) -> None:
        self._left = {stage: dict(amounts) for stage, amounts in self.work.items()}
        self._speeds = {kind: _Speed(guess) for kind, guess in self.guesses.items()}
        self._started = self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the work was planned."""
        return self.clock() - self._started

    def begin(self, stage: str, amounts: Amounts | None = None) -> None:
        """`stage` begins; `amounts` replace what was planned for it."""
        with self._lock:
            self._stage = stage
            if amounts is not None:
                self._left[stage] = dict(amounts)

    def end(self) -> None:
        """Nothing is left of the stage that began last."""
        with self._lock:
            if self._stage is not None:
                self._left[self._stage] = {}
            self._stage = None

    def start(self, kind: str, amount: float | None) -> None:
        """A step begins; None is all that is left of its kind in the stage."""
        with self._lock:
            if amount is None:
                amount = self._left.get(self._stage or "", {}).get(kind, 0.0)
            self._speeds.setdefault(kind, _Speed())
            self._running = _Begun(kind, amount, self.clock())

    def part(self, done: int, total: int) -> None:
        """Of the running step, `done` equal parts of `total` are over, the last one just now."""
        with self._lock:
            running = self._running
            if running is not None:
                self._credit(running, running.amount / max(total - done + 1, 1))

    def finish(self) -> None:
        """The running step is over."""
        with self._lock:
            if self._running is not None:
                self._credit(self._running, self._running.amount)
            self._running = None

    def drop(self) -> None:
        """The running step failed and tells nothing."""
        with self._lock:
            self._running = None

    def passed(self, kind: str, amount: float) -> None:
        """A step was done before: it tells no speed."""
        with self._lock:
            left = self._left.get(self._stage or "", {})
            if kind in left:
                left[kind] = max(left[kind] - amount, 0.0)

    def _credit(self, running: _Begun, amount: float) -> None:
        now, speed = self.clock(), self._speeds[running.kind]
        if amount > 0:
            speed.seconds += now - running.since
            speed.amount += amount
        self.passed(running.kind, amount)
        running.amount, running.since = running.amount - amount, now

    def seconds(self) -> float | None:
        """What is left, rather too much than too little; None where that is not known yet."""
        with self._lock:
            left: dict[str, float] = {}
            for amounts in self._left.values():
                for kind, amount in amounts.items():
                    left[kind] = left.get(kind, 0.0) + amount
            running = self._running
            total = 0.0
            if running is not None:
                left[running.kind] = max(left.get(running.kind, 0.0) - running.amount, 0.0)
                step = self._of_the_step(running)
                if step is None:
                    return None
                total += step
            for kind, amount in left.items():
                speed = self._speed(kind)
                if amount > 0 and speed is None:
                    return None
                total += amount * (speed or 0.0) * self._caution(kind, amount)
            return total

    def _of_the_step(self, running: _Begun) -> float | None:
        speed = self._speed(running.kind)
        if speed is None:
            return None
        spent = self.clock() - running.since
        return max(running.amount * speed - spent, _OVERDUE * spent)

    def _speed(self, kind: str) -> float | None:
        """Seconds a unit, as measured or guessed, and no less than the running step has shown."""
        speed = self._speeds.get(kind, _Speed())
        found = speed.guess if speed.measured is None else speed.measured
        running = self._running
        if found is None or running is None or running.kind != kind or running.amount <= 0:
            return found
        spent = self.clock() - running.since
        return max(found, (speed.seconds + spent) / (speed.amount + running.amount))

    def _caution(self, kind: str, left: float) -> float:
        """The less of a kind has run, the more of it counts."""
        done = self._speeds[kind].amount if kind in self._speeds else 0.0
        return 1 + _UNSURE * left / (left + done) if left > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Told:
    """Seconds as they are shown. `more`: there is more to do than may be told."""

    seconds: int
    more: bool = False

    def __str__(self) -> str:
        minutes, seconds = divmod(self.seconds, 60)
        text = f"{minutes} min {seconds} s" if minutes and seconds else f"{minutes} min"
        return f"{'more than' if self.more else 'about'} {text if minutes else f'{seconds} s'}"


@dataclass(slots=True)
class Steady:
    """Turns estimates into what is told: never a quarter above the least told after a minute."""

    least: float = math.inf

    def tell(self, seconds: float, elapsed: float) -> Told:
        """The time to tell where `seconds` are left, `elapsed` seconds after the beginning."""
        most = self.least * MOST_GROWTH
        shown = _rounded(seconds)
        held_back = shown > most
        if held_back:
            shown = math.floor(most / _step(most)) * _step(most)
        if elapsed >= SETTLING:
            self.least = min(self.least, shown)
        return Told(shown, more=held_back and seconds > MOST_GROWTH * shown)


def _rounded(seconds: float) -> int:
    return max(round(seconds / _step(seconds)) * _step(seconds), 1)


def _step(seconds: float) -> int:
    """To what times are rounded: whole minutes from ten on, ten seconds from one on."""
    return 60 if seconds >= 600 else 10 if seconds >= 60 else 1
