"""A claim of the paper beside what was found here, and how a part tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

from moac.evaluation.intervals import Interval


@dataclass(frozen=True, slots=True)
class Claim:
    """One row: what is claimed, what was found here, the paper's figure, and how it was measured.

    `note`: what has to be known to read it, such as that dense finds next to nothing.
    """

    what: str
    ours: str
    paper: str
    how: str
    note: str = ""


def times(value: float | None, ci95: Interval | None = None, *, least: bool = False) -> str:
    """A ratio with its interval: `3.5x (2.9 to 4.1)`; `least`: it may be more."""
    if value is None:
        return "not told"
    ends = "" if ci95 is None else f" ({ci95[0]:.2f} to {ci95[1]:.2f})"
    return f"{'at least ' if least else ''}{value:.2f}x{ends}"
