"""How much KV memory may stay: a share of the dense model's, bytes, or what a loss leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from moac_runtime.errors import UsageError

DEFAULT_BUDGET = 0.5


@dataclass(frozen=True, slots=True)
class Budget:
    """At most `share` of the dense model's KV memory. Raises UsageError outside of (0, 1]."""

    share: float = DEFAULT_BUDGET

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(
                f"the budget is {self.share:g}, expected above 0 and at most 1: the share of "
                "the dense model's KV memory that may stay"
            )


@dataclass(frozen=True, slots=True)
class MaxKvBytes:
    """At most `size` bytes for a session of `batch` sequences (None: 1) of `length` tokens (None:
    the capacity). Its share follows from the model; until one is opened it is taken as a half.
    Raises UsageError for a number below 1.
    """

    share: ClassVar[float] = DEFAULT_BUDGET
    size: int
    batch: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        told = (("max kv bytes", self.size), ("batch", self.batch), ("length", self.length))
        for name, found in told:
            if found is not None and found < 1:
                raise UsageError(f"{name} is {found}, expected at least 1")


@dataclass(frozen=True, slots=True)
class MaxLoss:
    """The least memory whose predicted loss is at most `nats` a token above the dense model's.

    It may be all of the memory. Raises UsageError for anything but a finite number above 0.
    """

    share: ClassVar[float] = 1.0
    nats: float

    def __post_init__(self) -> None:
        if not 0 < self.nats < math.inf:
            raise UsageError(
                f"the most loss is {self.nats:g}, expected a number of nats a token above 0"
            )


Goal = Budget | MaxKvBytes | MaxLoss


def goal_of(
    *,
    budget: float | None,
    max_kv_bytes: int | None,
    batch: int | None,
    length: int | None,
    max_loss: float | None,
) -> Goal:
    """The one goal that was asked for, a half of the memory where none was.

    Raises UsageError for two of them, for a goal that cannot be meant, and for `batch` or `length`
    without the bytes that they explain.
    """
    stated = {"--budget": budget, "--max-kv-bytes": max_kv_bytes, "--max-loss": max_loss}
    asked = [option for option, value in stated.items() if value is not None]
    if len(asked) > 1:
        raise UsageError(f"{asked[0]} and {asked[1]} both say how much may stay; give one of them")
    if max_kv_bytes is not None:
        return MaxKvBytes(max_kv_bytes, batch, length)
    for option, value in (("--batch", batch), ("--length", length)):
        if value is not None:
            raise UsageError(
                f"{option} says what --max-kv-bytes is for; give --max-kv-bytes with it"
            )
    if max_loss is not None:
        return MaxLoss(max_loss)
    return Budget() if budget is None else Budget(budget)
