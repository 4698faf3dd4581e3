"""Rows with memory of their own: they come and go at any step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from moac_runtime.backends.feeding import check_sizes
from moac_runtime.backends.layout import HeadRun, grown_runs, head_runs, packed_spans
from moac_runtime.backends.rows import Row, Rows
from moac_runtime.backends.session import Snapshot
from moac_runtime.errors import ArtifactError
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

    def packed(self, snapshot: Snapshot) -> bytes:
        """The keys and values of a snapshot, to be kept in a file."""
        self._check_snapshot(snapshot)
        return b"".join(self._parts(snapshot))

    def unpacked(self, path: Sequence[tuple[int, int]], length: int, data: bytes) -> Snapshot:
        """The snapshot that gave `packed` data, of a row of `length` tokens.

        `path`: the capacities that the row passed through, each with its tokens when it took it.
        Raises ArtifactError for data that is not of the size of such a row.
        """
        row = self._new_row(self._layers_after(path), path[-1][0])
        row.length = length
        if len(data) != (size := self._held_bytes(row)):
            raise ArtifactError(
                f"the cache of {length} tokens has {len(data)} bytes, expected {size}: it was "
                "saved otherwise or is damaged, so begin a new chat"
            )
        content = self._content(row, data)
        return Snapshot(len(data), length, path[-1][0], self._origin, content)

    def _layers_after(self, path: Sequence[tuple[int, int]]) -> list[list[HeadRun]]:
        (first, _), *later = path
        layers = [head_runs(heads) for heads in self._spans(first)]
        for capacity, length in later:
            layers = [
                [grown.run for grown in grown_runs(runs, heads, length)]
                for runs, heads in zip(layers, self._spans(capacity), strict=True)
            ]
        return layers

    def _spans(self, capacity: int) -> list[list[HeadSpan]]:
        """Every layer's spans in a row of `capacity` tokens, heads in packed order."""
        return packed_spans(self._plan, self._head_order, capacity)

    @abstractmethod
    def _new_row(self, layers: list[list[HeadRun]], capacity: int) -> R:
        """An empty row with memory for these runs of heads."""

    @abstractmethod
    def _parts(self, snapshot: Snapshot) -> Iterator[bytes]:
        """The keys and values of a snapshot, piece by piece."""

    @abstractmethod
    def _held_bytes(self, row: R) -> int:
        """Bytes of the filled slots of a row as it stands."""

    @abstractmethod
    def _content(self, row: R, data: bytes) -> object:
        """What a snapshot of `row` holds whose pieces are `data`."""
