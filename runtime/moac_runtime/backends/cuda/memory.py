"""What a session takes on the device, told before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from moac_runtime.errors import MoacError
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec

MOST_CHUNK = 8192
"""Tokens that share a step of prefill at most: enough to keep every processor busy."""

LEAST_CHUNK = 256

_GIB = 2**30
# cuBLAS (32 MiB of workspace on each of two streams, and its code), recorded steps, tables
_SPARE = 256 * 2**20
_ROUNDED = 2 * 2**20  # bytes that torch rounds a large allocation up to
_LOGITS = 4  # copies of a row's float32 logits that live at once, the choice of a token included


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes of a session: `row` for each row, `token` for each token of a prefill step.

    `fixed`: whatever the size.
    """

    row: int
    token: int
    fixed: int

    def bytes(self, batch: int) -> int:
        """Of so many rows with the smallest steps of prefill."""
        return batch * self.row + LEAST_CHUNK * self.token + self.fixed

    def fitting(self, free: int) -> int:
        """The most rows that fit in `free` bytes."""
        return max((free - self.bytes(0)) // self.row, 0)

    def chunk(self, batch: int, free: int) -> int:
        """Tokens of a prefill step that fit beside so many rows."""
        left = free - batch * self.row - self.fixed
        return max(min(left // self.token, MOST_CHUNK), LEAST_CHUNK)


def session_demand(spec: ModelSpec, plan: Plan, capacity: int, *, itemsize: int) -> Demand:
    """What rows of `capacity` tokens take under `plan`."""
    kv = plan.held_tokens(capacity) * spec.kv_token_bytes(itemsize)
    attention = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim  # and its output
    feed_forward = 3 * max(spec.mlp_widths)  # gate, up and their product
    rotations = len(spec.ropes) + any(layer.rope is None for layer in spec.kinds)
    # residual, normalised, and what is added to them
    numbers = 3 * spec.hidden_size + attention + feed_forward
    partial = spec.num_heads * (spec.head_dim + 1) * 4
    return Demand(
        row=kv + partial + _LOGITS * 4 * spec.vocab_size,
        token=numbers * itemsize + 8 * spec.head_dim * rotations,
        fixed=_SPARE + 2 * spec.num_layers * _ROUNDED,
    )


def check_fit(demand: Demand, *, batch: int, capacity: int, free: int) -> None:
    """Raises MoacError where `batch` rows do not fit in `free` bytes, telling how many do."""
    needed = demand.bytes(batch)
    if needed <= free:
        return
    fits = demand.fitting(free)
    remedy = (
        f"batch {fits} fits; give --max-batch {fits}"
        if fits
        else "not even one row fits; give less --capacity"
    )
    raise MoacError(
        f"a batch of {batch} rows of {capacity} tokens needs {needed / _GIB:.1f} GiB, "
        f"{free / _GIB:.1f} free: {remedy}"
    )
