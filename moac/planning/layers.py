"""What every layer can do at given prices, where it may use only a few distinct rules.

Once budgets and bounds have prices, layers no longer depend on each other, and the best few rules
of one are found by trying every set of so many rules.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from math import comb

import numpy as np

from moac.planning.problem import Floats, Ints


def num_sets(rules: int, limit: int) -> int:
    """How many sets of at most `limit` of `rules` rules there are."""
    return comb(rules + limit - 1, limit)


def rule_sets(rules: int, limit: int) -> Ints:
    """Every set, `[sets, limit]` ascending; one with fewer rules repeats its last."""
    return np.array(list(combinations_with_replacement(range(rules), limit)), dtype=np.int64)


def set_prices(prices: Floats, limit: int) -> Floats:
    """What each layer pays with each set, `[layers, sets]` in the order of `rule_sets`.

    `prices` `[layers, heads, rules]`: every head takes the cheapest rule of the set.
    """
    if limit == 1:
        total: Floats = prices.sum(axis=1)
        return total
    firsts = range(prices.shape[2])
    with_first = (np.minimum(prices[:, :, a:], prices[:, :, a : a + 1]) for a in firsts)
    return np.concatenate([set_prices(rest, limit - 1) for rest in with_first], axis=1)
