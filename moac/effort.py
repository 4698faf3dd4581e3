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
    are profiled again.
    """

    samples: int
    plans: int
    lengths: int
    longest: int
    drafts: int


STANDARD = "standard"

EFFORTS: Mapping[str, Effort] = {
    "quick": Effort(samples=4, plans=1, lengths=2, longest=2048, drafts=1),
    STANDARD: Effort(samples=5, plans=3, lengths=3, longest=4096, drafts=2),
    "thorough": Effort(samples=20, plans=5, lengths=3, longest=4096, drafts=3),
}
