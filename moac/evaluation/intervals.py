"""95 % confidence intervals: Wilson's for shares, Student's for means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

Interval = tuple[float, float]

_Z = 1.959963984540054
_T_OF_ONE = 12.706204736174698  # the expansion below is no use at one degree of freedom


def share_interval(scores: Sequence[float]) -> Interval:
    """Wilson's interval of the mean of `scores`, each 0 to 1.

    Exact matches are 0 or 1. Recall lies between, varies less than 0 or 1 with the same mean
    would, and so gets an interval that is rather too wide.
    """
    n, share = len(scores), fmean(scores)
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    # rounding must not put 0 of n or n of n outside
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean of `values`; None for a single one."""
    if len(values) < 2:
        return None
    centre = fmean(values)
    half = _student(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return centre - half, centre + half


def _student(freedom: int) -> float:
    """The 0.975 quantile of Student's distribution (Cornish-Fisher; within 3 % from 2 up)."""
    if freedom == 1:
        return _T_OF_ONE
    z, v = _Z, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3
