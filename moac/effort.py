"""How much measuring a plan gets: a compile in minutes, the usual one, or all that helps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effort:
    """What an effort comes to.

    `samples`: of running text at the shortest length, from which the other counts follow.
    `plans`: of the Pareto front that are measured. `lengths`: how many, doubling, are profiled.
    `longest`: the longest of them on a CPU, in tokens. `drafts`: of the plan around which answers
    are profiled again. `rows`: of the query rows of a sample of `length` tokens, one in
    `length // rows` is looked at, all of them up to `2 * rows` (None: at any length).
    """

    samples: int
    plans: int
    lengths: int
    longest: int
    drafts: int
    rows: int | None

    def stride(self, length: int) -> int:
        """Of how many query rows in a row one is looked at in a sample of `length` tokens."""
        return 1 if self.rows is None else max(1, length // self.rows)


STANDARD = "standard"

EFFORTS: Mapping[str, Effort] = {
    "quick": Effort(samples=3, plans=1, lengths=2, longest=2048, drafts=1, rows=512),
    STANDARD: Effort(samples=5, plans=5, lengths=3, longest=4096, drafts=3, rows=None),
    "thorough": Effort(samples=20, plans=5, lengths=3, longest=4096, drafts=3, rows=None),
}
