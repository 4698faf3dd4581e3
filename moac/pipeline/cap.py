"""`--max-kv-bytes`: a hard cap on the KV bytes of a session, turned into the budget that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moac.checkpoint import Checkpoint
from moac.goal import MaxKvBytes
from moac.planning import HeadLayout
from moac.request import CompileRequest
from moac_runtime.errors import BudgetError, UsageError
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.plan import Plan

_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


@dataclass(frozen=True, slots=True)
class KvCap:
    """At most `max_bytes` for the keys and values of `batch` sequences at a capacity of `length`
    tokens. `kv`: a key of the package.
    """

    max_bytes: int
    batch: int
    length: int
    kv: KvShape

    @classmethod
    def of(cls, checkpoint: Checkpoint, request: CompileRequest) -> KvCap | None:
        """What the request asks for, None where it sets no cap. Raises UsageError."""
        goal = request.goal
        if not isinstance(goal, MaxKvBytes):
            return None
        context = checkpoint.spec.context
        most = request.capacity or context
        length = goal.length or most
        if length > most:
            limit = "the capacity" if most < context else "the model's context"
            raise UsageError(
                f"--length {length} is beyond {limit} of {most} tokens, which no session passes; "
                f"give --length {most} or less"
            )
        if length <= request.min_span:
            raise UsageError(
                f"--length {length} is no longer than the smallest span of {request.min_span} "
                "tokens, so there is nothing to plan; give a longer --length"
            )
        return cls(
            max_bytes=goal.size,
            batch=goal.batch or 1,
            length=length,
            kv=kv_shape(checkpoint, request),
        )

    def budget(self, layout: HeadLayout, lengths: Sequence[int]) -> float:
        """The largest share of memory at `length` whose bytes the cap holds.

        The same share is then the budget at all of `lengths`. Raises BudgetError where no plan
        is that small and UsageError where the dense model already fits.
        """
        unit = self._unit(layout)
        most = self.max_bytes // (self.batch * unit)
        dense = layout.dense_tokens(self.length) * layout.token_memory
        if most >= dense:
            raise UsageError(
                f"the dense model holds {self._told(dense * unit)}, which fits the "
                f"{told_bytes(self.max_bytes)} of --max-kv-bytes; there is nothing to drop: use "
                "the checkpoint as it is, or give --budget instead"
            )
        least, where = _least(layout, lengths, self.length)
        if most < least:
            needed = least * self.batch * unit
            raise BudgetError(
                f"no plan fits the {told_bytes(self.max_bytes)} of --max-kv-bytes: the smallest "
                f"holds {self._told(least * unit)}, since every head keeps {layout.min_span} "
                f"tokens at a length of {where}; give --max-kv-bytes {needed} or more"
            )
        return most / dense

    def held_bytes(self, plan: Plan) -> int:
        """What the session allocates under `plan`."""
        return plan.held_bytes(self.length, self.kv) * self.batch

    def record(self, plan: Plan) -> dict[str, Any]:
        """What `plan.json` tells of it."""
        return {
            "max_bytes": self.max_bytes,
            "batch": self.batch,
            "length": self.length,
            "token_bytes": self.kv.token_bytes(),
            "held_bytes": self.held_bytes(plan),
        }

    def _unit(self, layout: HeadLayout) -> int:
        """Bytes of what `layout` counts memory in."""
        return self.kv.token_bytes() if layout.kv is None else 1

    def _told(self, row: int) -> str:
        count = row * self.batch
        many = "sequence" if self.batch == 1 else "sequences"
        return f"{told_bytes(count)} for {self.batch} {many} of {self.length} tokens"


def kv_shape(checkpoint: Checkpoint, request: CompileRequest) -> KvShape:
    """A key of the package, whose bytes are counted."""
    return checkpoint.spec.kv_shape(DTYPE_BYTES[request.dtype or checkpoint.dtype])


def told_bytes(count: int) -> str:
    """A size as people read it, and exactly: `1.50 GiB (1610612736 bytes)`."""
    for unit, size in _UNITS:
        if count >= size:
            return f"{count / size:.2f} {unit} ({count} bytes)"
    return f"{count} bytes"


def _least(layout: HeadLayout, lengths: Sequence[int], length: int) -> tuple[int, int]:
    """The least memory at `length` whose share the smallest plan meets at all of `lengths`.

    And the one of them that needs so many.
    """
    smallest = layout.uniform(layout.least)
    dense, unit = layout.dense_tokens, layout.token_memory

    def needed(n: int) -> int:
        return -(-layout.held(smallest, n) * dense(length) * unit // (dense(n) * unit))

    needs = [(needed(n), n) for n in lengths]
    return max(needs, key=lambda need: (need[0], -need[1]))
