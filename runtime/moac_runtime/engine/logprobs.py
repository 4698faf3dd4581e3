"""How likely the model found the token it chose, and the likeliest ones beside it."""

from __future__ import annotations

from dataclasses import dataclass

from moac_runtime.backends.arrays import Array


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """`token` and its log probability, and the likeliest tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: Array, token: int, count: int) -> TokenLogprobs:
    """Of one row's `logits` `[V]`, before temperature and filters; `count`: likely ones told."""
    import numpy as np

    row = np.asarray(logits.cpu() if hasattr(logits, "cpu") else logits, dtype=np.float64)
    shifted = row - row.max()
    found = shifted - np.log(np.exp(shifted).sum())
    best = np.argpartition(-found, min(count, len(found) - 1))[:count].tolist()
    ranked = sorted(((i, float(found[i])) for i in best), key=lambda one: (-one[1], one[0]))
    return TokenLogprobs(token, float(found[token]), tuple(ranked))
