"""What plans hold at every capacity, not only at the planned lengths.

Spans are step functions of the capacity, so density jumps between the lengths a plan was made for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from moac.planning.problem import HeadLayout, Ints, allowed_at
from moac_runtime.package.kv_format import KvShape
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


def held_at(plan: Plan, capacities: Ints, kv: KvShape | None = None) -> Ints:
    """Tokens held over all heads at each of `capacities`, `[n]`; with `kv` bytes of such keys."""
    heads = Counter(
        (rule, window)
        for layer, window in zip(plan.rules, plan.windows, strict=True)
        for rule in layer
    )
    total = np.zeros_like(capacities)
    for (rule, window), count in heads.items():
        sizes = sizes_at(rule, capacities, block=plan.block, min_span=plan.min_span, window=window)
        total += count * memory_of(sizes, rule.bits, kv)
    return total


def memory_of(sizes: Ints, bits: int | None, kv: KvShape | None) -> Ints:
    """What a head of so many tokens takes: bytes of keys `kv`, or, without, the tokens."""
    memory: Ints = sizes if kv is None else kv.slots_bytes(sizes, bits)
    return memory


def largest_density(plan: Plan, capacities: range) -> tuple[float, int]:
    """The greatest density over all of `capacities`, and the first of them that has it."""
    return _largest(plan, capacities, None)


def largest_share(plan: Plan, capacities: range, kv: KvShape | None) -> tuple[float, int]:
    """The same of the bytes of keys `kv`; without widths, or `kv`, that is the density."""
    return _largest(plan, capacities, kv if plan.rounds else None)


def _largest(plan: Plan, capacities: range, kv: KvShape | None) -> tuple[float, int]:
    if not capacities or capacities[0] < 1:
        raise ValueError(f"capacities must be some from 1 up, got {capacities}")
    parts = (capacities[first : first + _AT_ONCE] for first in range(0, len(capacities), _AT_ONCE))
    return max((_largest_of(plan, part, kv) for part in parts), key=lambda found: found[0])


def _largest_of(plan: Plan, capacities: range, kv: KvShape | None) -> tuple[float, int]:
    every = np.array(capacities, dtype=np.int64)
    densities = held_at(plan, every, kv) / HeadLayout.of(plan, kv).dense_at(every)
    place = int(densities.argmax())
    return float(densities[place]), capacities[place]


def largest_record(plan: Plan, capacities: range, kv: KvShape | None = None) -> dict[str, Any]:
    """The largest density as `plan.json` and `inspect --json` tell it, with the ends of
    `capacities`; with `kv` the largest share of bytes.
    """
    found, length = _largest(plan, capacities, kv)
    ends = {"shortest": capacities[0], "longest": capacities[-1]}
    return {"density" if kv is None else "share": found, "length": length, **ends}


def over_budget(
    plan: Plan,
    budget: float,
    capacities: range,
    *,
    between: Sequence[int],
    kv: KvShape | None = None,
) -> tuple[int, ...]:
    """Where `plan` passes `budget` by most, one capacity in each gap `between` those given.

    `kv`: the keys whose bytes are counted; None counts tokens.
    """
    every = np.array(capacities, dtype=np.int64)
    over = held_at(plan, every, kv) - allowed_at(HeadLayout.of(plan, kv), budget, every)
    passed = np.flatnonzero(over > 0)
    gaps = np.searchsorted(np.array(between), every[passed])
    return tuple(_worst(passed[gaps == gap], over, every) for gap in np.unique(gaps))


def _worst(places: Ints, over: Ints, every: Ints) -> int:
    return int(every[places[np.argmax(over[places] / every[places])]])
