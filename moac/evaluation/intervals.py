"""95 % confidence intervals: Wilson's for shares, Student's for means, Welch's for strata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev, variance

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


def stratified_interval(strata: Sequence[Sequence[float]]) -> Interval | None:
    """The interval of the mean of the means of `strata`; None where one has a single value.

    How far strata lie apart is no chance, so only what varies within them counts (Welch and
    Satterthwaite's degrees of freedom).
    """
    if min(map(len, strata)) < 2:
        return None
    centre = fmean(fmean(values) for values in strata)
    errors = [variance(values) / len(values) for values in strata]
    total = sum(errors)
    if total == 0:
        return centre, centre
    freedom = total**2 / sum(e**2 / (len(v) - 1) for e, v in zip(errors, strata, strict=True))
    half = _student(freedom) * math.sqrt(total) / len(strata)
    return centre - half, centre + half


def _student(freedom: float) -> float:
    """The 0.975 quantile of Student's distribution (Cornish-Fisher; within 3 % from 2 up)."""
    if freedom < 2:
        # between 1 and 2 the larger of the two ends, which is rather too wide
        return _T_OF_ONE
    z, v = _Z, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3
