"""The span contract: how many tokens a KV head holds at a capacity, and which ones it sees.

Everything that needs a span (planner, reference, kernels, torch path, export) calls this file.
Rule: MoA, arXiv 2406.14909, section 4 (elastic rules), counted so that the span includes the sink.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, order=True)
class Rule:
    """An elastic span rule `S(N) = alpha + beta * N`; `alpha` in tokens, `beta` dimensionless.

    `bits`: the width of the head's keys and values, 8 or 4; None is the package's dtype.
    """

    alpha: int
    beta: float
    bits: int | None = None


DENSE = Rule(alpha=0, beta=1.0)


@dataclass(frozen=True, slots=True)
class HeadSpan:
    """What one KV head holds and sees at a fixed capacity.

    `size`: tokens held, sink included. `sink`: first tokens pinned (0 where nothing is ever
    dropped, or where the checkpoint's own sliding window alone rules). `window`: the checkpoint's
    own sliding window in tokens, None where the layer attends fully. `bits`: the width of its keys
    and values, None for the package's dtype.
    """

    size: int
    sink: int
    window: int | None = None
    bits: int | None = None


def span_tokens(rule: Rule, capacity: int, *, block: int, min_span: int) -> int:
    """`clip(round_up(alpha + beta * N, block), min_span, N)`, in tokens, sink included."""
    wanted = math.ceil((rule.alpha + rule.beta * capacity) / block) * block
    return min(max(wanted, min_span), capacity)


def dense_tokens(windows: Iterable[int | None], num_kv_heads: int, capacity: int) -> int:
    """Tokens that a model holds by itself at `capacity` tokens, over all layers and KV heads.

    `windows`: of each layer the checkpoint's own sliding window in tokens, None where it has none.
    What plans drop, and what a budget is a share of, counts against this.
    """
    return num_kv_heads * sum(capacity if w is None else min(w, capacity) for w in windows)


def head_span(
    rule: Rule,
    capacity: int,
    *,
    sink: int,
    block: int,
    min_span: int,
    window: int | None = None,
) -> HeadSpan:
    """Resolve `rule` at `capacity` tokens for a layer whose own sliding window is `window`.

    The own window caps the span; a head that reaches the cap runs the checkpoint's own mask.
    """
    limit = capacity if window is None else min(capacity, window)
    size = min(span_tokens(rule, capacity, block=block, min_span=min_span), limit)
    binding = window if window is not None and window < capacity else None
    return HeadSpan(size, sink=0 if size == limit else sink, window=binding, bits=rule.bits)


def visible(query: Any, key: Any, head: HeadSpan) -> Any:
    """Whether position `query` sees position `key`; ints, or integer tensors that broadcast."""
    distance = query - key
    seen = (distance >= 0) & ((key < head.sink) | (distance < head.size - head.sink))
    return seen if head.window is None else seen & (distance < head.window)
