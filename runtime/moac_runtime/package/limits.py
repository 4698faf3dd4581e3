"""The largest numbers that a package's records may hold: beyond them they are damaged or hostile.

No model comes near them. Products of the sizes fit into 64 bits, in which native code counts.
"""

from __future__ import annotations

MOST_CONTEXT = 2**24
"""Tokens of a capacity and of a model's context."""
MOST_TOKENS = 2**31
"""Of a span, a window or a block."""
MOST_LAYERS = 10_000
MOST_ROPES = 64
MOST_HEADS = 2**16
MOST_EXPERTS = 4096
MOST_SIZE = 2**31
"""Of all other whole numbers."""

_MOST_FACTOR = 1e12
_MOST = {
    "context": MOST_CONTEXT,
    "num_heads": MOST_HEADS,
    "num_kv_heads": MOST_HEADS,
    "head_dim": 1024,
    "count": MOST_EXPERTS,
}


def most_of(name: str, value: object) -> float | None:
    """The largest value of the field `name` of a record; None for what is no number."""
    if type(value) is int:
        return _MOST.get(name, MOST_SIZE)
    return _MOST_FACTOR if type(value) is float else None
