"""What plans hold at every capacity, not only at the planned lengths.

Spans are step functions of the capacity, so density jumps between the lengths a plan was made for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from moac.planning.problem import HeadLayout, Ints, allowed_at
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule

_AT_ONCE = 2**20  # capacities: some arrays of 8 MiB


def sizes_at(
    rule: Rule, capacities: Ints, *, block: int, min_span: int, window: int | None = None
) -> Ints:
    """`head_span(...).size` at each of many `capacities`, `[n]`: its operations, bit for bit."""
    blocks = np.ceil((rule.alpha + rule.beta * capacities) / block)
    wanted = np.maximum(blocks.astype(np.int64) * block, min_span)
    return np.minimum(wanted, capacities if window is None else np.minimum(capacities, window))


def held_at(plan: Plan, capacities: Ints) -> Ints:
    """Tokens held over all heads at each of `capacities`, `[n]`."""
    heads = Counter(
        (rule, window)
        for layer, window in zip(plan.rules, plan.windows, strict=True)
        for rule in layer
    )
    total = np.zeros_like(capacities)
    for (rule, window), count in heads.items():
        total += count * sizes_at(
            rule, capacities, block=plan.block, min_span=plan.min_span, window=window
        )
    return total


def largest_density(plan: Plan, capacities: range) -> tuple[float, int]:
    """The greatest density over all of `capacities`, and the first of them that has it."""
    if not capacities or capacities[0] < 1:
        raise ValueError(f"capacities must be some from 1 up, got {capacities}")
    parts = (capacities[first : first + _AT_ONCE] for first in range(0, len(capacities), _AT_ONCE))
    return max((_largest(plan, part) for part in parts), key=lambda found: found[0])


def _largest(plan: Plan, capacities: range) -> tuple[float, int]:
    every = np.array(capacities, dtype=np.int64)
    densities = held_at(plan, every) / HeadLayout.of(plan).dense_at(every)
    place = int(densities.argmax())
    return float(densities[place]), capacities[place]


def largest_record(plan: Plan, capacities: range) -> dict[str, Any]:
    """The same as `plan.json` and `inspect --json` tell it, with the ends of `capacities`."""
    density, length = largest_density(plan, capacities)
    ends = {"shortest": capacities[0], "longest": capacities[-1]}
    return {"density": density, "length": length, **ends}


def over_budget(
    plan: Plan, budget: float, capacities: range, *, between: Sequence[int]
) -> tuple[int, ...]:
    """Where `plan` passes `budget` by most, one capacity in each gap `between` those given."""
    every = np.array(capacities, dtype=np.int64)
    over = held_at(plan, every) - allowed_at(HeadLayout.of(plan), budget, every)
    passed = np.flatnonzero(over > 0)
    gaps = np.searchsorted(np.array(between), every[passed])
    return tuple(_worst(passed[gaps == gap], over, every) for gap in np.unique(gaps))


def _worst(places: Ints, over: Ints, every: Ints) -> int:
    return int(every[places[np.argmax(over[places] / every[places])]])
