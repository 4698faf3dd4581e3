"""How keys and values are held: in the package's dtype, or rounded to 8 or 4 bits.

A head's width is its rule's `bits`; None, the neutral value, is the package's dtype ("full").
docs/FORMAT.md ("Keys and values in 8 and 4 bits") says it to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moac_runtime.package.span import HeadSpan

KV_BITS = (8, 4)
"""The widths that a rule may name, beside none."""

PLANNED = "planned"
"""What a manifest says of keys and values whose width is each rule's own."""

GROUP = 32  # of 4 bits: how many numbers of a head share a scale and a minimum
ROTATED = 64  # of 4 bits: the most numbers of a head that are rotated together
ALIGNMENT = 16  # bytes that rounded codes and scales of a head are padded to


def rotation_block(head_dim: int) -> int:
    """How many numbers a 4-bit head rotates together: a power of two that divides its width."""
    return math.gcd(head_dim, ROTATED)


def groups(head_dim: int) -> int:
    """Groups of a 4-bit key or value; the last one is shorter where 32 does not divide."""
    return -(-head_dim // GROUP)


@dataclass(frozen=True, slots=True)
class KvShape:
    """The key, or the value, of one token and KV head: `head_dim` numbers.

    `itemsize`: bytes of each in the package's dtype. `bits` is 8, 4 or None throughout, `slots` a
    number or an array of them.
    """

    head_dim: int
    itemsize: int

    def code_bytes(self, bits: int | None) -> int:
        """Bytes of the numbers of one token's key or value."""
        if bits is None:
            return self.head_dim * self.itemsize
        return self.head_dim if bits == 8 else -(-self.head_dim // 2)

    def scale_bytes(self, bits: int | None) -> int:
        """Bytes of the scales of one token's key or value, and of the minima of 4 bits."""
        return {None: 0, 8: 2, 4: 4 * groups(self.head_dim)}[bits]

    def codes(self, slots: Any, bits: int | None) -> Any:
        """Bytes of the numbers of `slots` keys of one head, as they lie."""
        size = slots * self.code_bytes(bits)
        return size if bits is None else _padded(size)

    def scales(self, slots: Any, bits: int | None) -> Any:
        """Bytes of the scales of `slots` keys of one head, as they lie."""
        return _padded(slots * self.scale_bytes(bits))

    def slots_bytes(self, slots: Any, bits: int | None) -> Any:
        """Bytes of `slots` keys and values of one KV head, scales included, as they lie."""
        return 2 * (self.codes(slots, bits) + self.scales(slots, bits))

    def head_bytes(self, head: HeadSpan) -> int:
        """Bytes of all keys and values of one KV head, scales included."""
        return int(self.slots_bytes(head.size, head.bits))

    def token_bytes(self, bits: int | None = None) -> int:
        """Bytes that one token more costs one KV head, key and value, padding left out."""
        return 2 * (self.code_bytes(bits) + self.scale_bytes(bits))


def _padded(size: Any) -> Any:
    return -(-size // ALIGNMENT) * ALIGNMENT
