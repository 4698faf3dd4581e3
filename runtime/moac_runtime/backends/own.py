"""Rows with memory of their own: they come and go at any step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, TypeVar

from moac_runtime.backends.feeding import check_sizes
from moac_runtime.backends.layout import HeadRun, head_runs, packed_spans
from moac_runtime.backends.rows import Row, Rows
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import HeadSpan


class OwnRow(Row, Protocol):
    """A row and the memory that it alone has."""

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, all layers and heads."""


R = TypeVar("R", bound=OwnRow)


class OwnRows(Rows[R], ABC):
    """Rows of a session of `model`.

    `head_order[layer][position]`: the checkpoint's KV head packed at that position, which finds
    a head's rule in `plan`. `chunk`: tokens that share a pass through the model, all rows
    together; a step of more is several. Raises UsageError for a chunk below one.
    """

    fixed_batch = False

    def __init__(
        self,
        vocab_size: int,
        model: object,
        plan: Plan,
        head_order: Sequence[Sequence[int]],
        *,
        chunk: int,
    ) -> None:
        check_sizes(chunk=chunk)
        super().__init__(vocab_size, (model, plan, head_order))
        self._plan, self._head_order = plan, head_order
        self._chunk = chunk

    def admit(self, capacity: int) -> int:
        """A new row. Raises UsageError for a capacity below one."""
        check_sizes(capacity=capacity)
        layers = [head_runs(heads) for heads in self._spans(capacity)]
        return self._enter(self._new_row(layers, capacity))

    def kv_bytes(self, row: int | None = None) -> int:
        """Bytes allocated for keys and values, of one row or of all that are present."""
        if row is not None:
            return self._row(row).bytes
        return sum(present.bytes for present in self._by_number.values())

    def _spans(self, capacity: int) -> list[list[HeadSpan]]:
        """Every layer's spans in a row of `capacity` tokens, heads in packed order."""
        return packed_spans(self._plan, self._head_order, capacity)

    @abstractmethod
    def _new_row(self, layers: list[list[HeadRun]], capacity: int) -> R:
        """An empty row with memory for these runs of heads."""
