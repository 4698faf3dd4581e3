"""Which lengths a plan is made for, measured at and checked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moac.effort import Effort
from moac_runtime.errors import UsageError

_LONGER_ON_GPU = 2  # times


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens. `profiled`: where influence is measured, ascending. `extrapolated`: where the
    budget must hold too, None where the context ends before. `unseen`: where plans are compared.
    `upto`: the longest session. `capped`: the length of the one whose KV bytes are bounded, where
    they are.
    """

    profiled: tuple[int, ...]
    extrapolated: int | None
    unseen: int
    upto: int
    capped: int | None = None

    @property
    def planned(self) -> tuple[int, ...]:
        """Every length at which the plan meets the budget, ascending."""
        others = {n for n in (self.extrapolated, self.capped) if n is not None}
        return tuple(sorted({*self.profiled, *others}))

    @property
    def capacities(self) -> range:
        """Every capacity at which the plan meets the budget: from the shortest planned length."""
        return range(self.planned[0], max(self.planned[-1], self.upto) + 1)


def choose_lengths(
    asked: Sequence[int] | None,
    *,
    context: int,
    block: int,
    min_span: int,
    gpu: bool,
    effort: Effort,
    upto: int | None = None,
    capped: int | None = None,
) -> Lengths:
    """The lengths asked for, else as many doubling ones as `effort` says, up to half the context.

    `upto`: the longest session, None for one of the whole context. `capped`: a length whose KV
    bytes are bounded, at which the budget holds too.

    Raises UsageError for a length beyond the context or too short to hold a span and more.
    """
    profiled = sorted(set(asked)) if asked else _default(context, block, min_span, effort, gpu=gpu)
    for length in profiled:
        if length > context:
            raise UsageError(
                f"the length {length} is beyond the model's context of {context} tokens; "
                "give --lengths within it"
            )
        if length <= min_span:
            raise UsageError(
                f"the length {length} is no longer than the smallest span of {min_span} tokens, "
                "so there is nothing to plan; give longer --lengths"
            )
    longest = profiled[-1]
    extrapolated = min(2 * longest, context)
    return Lengths(
        profiled=tuple(profiled),
        extrapolated=extrapolated if extrapolated > longest else None,
        unseen=_unseen(profiled, block),
        upto=upto or context,
        capped=capped,
    )


def _default(context: int, block: int, min_span: int, effort: Effort, *, gpu: bool) -> list[int]:
    most = effort.longest * (_LONGER_ON_GPU if gpu else 1)
    longest = min(context // 2, most) // block * block
    lengths = [longest // 2**halved // block * block for halved in range(effort.lengths)]
    fitting = sorted({length for length in lengths if length >= 2 * min_span})
    if not fitting:
        raise UsageError(
            f"the model's context of {context} tokens is too short for spans of at least "
            f"{min_span} tokens; give --lengths, and smaller --sink and --min-span"
        )
    return fitting


def _unseen(profiled: Sequence[int], block: int) -> int:
    """Between the two shortest profiled lengths: unseen, and cheap enough for many plans."""
    if len(profiled) > 1:
        return (profiled[0] + profiled[1]) // 2
    return profiled[0] - block // 2
