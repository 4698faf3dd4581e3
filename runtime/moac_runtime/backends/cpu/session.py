"""A session on the native CPU kernels, without torch: each row a piece of memory of its own.

A step is one native call for all rows that are fed, whether one adds one token or many.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from moac_runtime.backends.arrays import Array
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.library import SegmentStruct, StepStruct, integers
from moac_runtime.backends.cpu.row import CpuRow, Held
from moac_runtime.backends.feeding import Piece, check_growth, cut, num_wanted
from moac_runtime.backends.layout import HeadRun, grown_runs, rope_tables
from moac_runtime.backends.own import OwnRows
from moac_runtime.backends.session import Feed, Snapshot
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.plan import Plan

# Tokens of a step: enough that reading and packing weights costs little beside computing.
CHUNK = 512


class CpuSession(OwnRows[CpuRow]):
    """See `backends.session.Session` and `OwnRows`; a pass through the model is a native call.

    A row's logits follow from what it was fed alone, in the same feeds: they are the same bits
    beside any neighbours. In other feeds, or on another number of threads, sums are taken in
    another order, and logits differ by rounding; so they do with 8-bit weights in bfloat16 where
    more than 16 tokens share a step.
    """

    def __init__(
        self,
        engine: CpuEngine,
        plan: Plan,
        head_order: Sequence[Sequence[int]],
        *,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__(engine.spec.vocab_size, engine, plan, head_order, chunk=chunk)
        self._engine = engine
        self._call: _Call | None = None

    def release(self, row: int) -> None:
        """Free a row. Raises UsageError for one that is not there."""
        self._leave(row).free()
        self._call = None

    def step(self, feeds: Sequence[Feed]) -> Array:
        """Feed some rows; float32 logits `[sum of wanted, V]`.

        Raises UsageError for feeds that cannot be meant and MoacError where a row would pass its
        capacity, before anything is fed; MoacError where memory is short, which ends the step at
        the native call that lacks it.
        """
        rows = self._check_feeds(feeds)
        logits = _empty(num_wanted(feeds), self._vocab_size)
        for pieces in cut(feeds, self._chunk):
            call = self._call_of(feeds, pieces, rows)
            tokens: list[int] = []
            for piece in pieces:
                tokens += feeds[piece.feed].tokens[piece.first : piece.stop]
            self._engine.run(call.fill(tokens, logits))
            for piece in pieces:
                rows[piece.feed].length += piece.size
        return logits

    def snapshot(self, row: int) -> Snapshot:
        """A copy of the row. Raises UsageError for one that is not there."""
        found = self._row(row)
        held = found.held()
        size = sum(map(len, held.parts))
        return Snapshot(size, found.length, found.capacity, self._origin, held)

    def restore(self, snapshot: Snapshot) -> int:
        """A new row from a copy. Raises UsageError for a snapshot of something else."""
        self._check_snapshot(snapshot)
        row = self._new_row(snapshot.content.layers, snapshot.capacity)
        row.take(snapshot.content, snapshot.length)
        return self._enter(row)

    def grow(self, row: int, capacity: int) -> None:
        """Move a row to new memory. Raises UsageError for a capacity that is not larger."""
        old = self._row(row)
        check_growth(old.capacity, capacity)
        growth = [
            grown_runs(runs, heads, old.length)
            for runs, heads in zip(old.layers, self._spans(capacity), strict=True)
        ]
        new = self._new_row([[grown.run for grown in layer] for layer in growth], capacity)
        new.take_grown(old, growth)
        self._by_number[row] = new
        self._call = None
        old.free()

    def _new_row(self, layers: list[list[HeadRun]], capacity: int) -> CpuRow:
        spec = self._engine.spec
        tables = rope_tables(spec.ropes, spec.head_dim, capacity)
        frequencies = [frequency for table in tables for frequency in table]
        row = CpuRow(
            layers,
            capacity=capacity,
            kv=spec.kv_shape(DTYPE_BYTES[self._engine.dtype]),
            frequencies=(ctypes.c_float * len(frequencies))(*frequencies),
        )
        self._engine.check_caches(row.caches)
        return row

    def _parts(self, snapshot: Snapshot) -> Iterator[bytes]:
        return iter(snapshot.content.parts)

    def _held_bytes(self, row: CpuRow) -> int:
        return row.filled_bytes

    def _content(self, row: CpuRow, data: bytes) -> Held:
        return row.held_from(memoryview(data))

    def _call_of(
        self, feeds: Sequence[Feed], pieces: Sequence[Piece], rows: Sequence[CpuRow]
    ) -> _Call:
        """The native call for some pieces: the last one again where nothing but tokens changed."""
        key = [(feeds[piece.feed].row, piece.size, piece.wanted, piece.place) for piece in pieces]
        if self._call is None or self._call.key != key:
            self._call = _Call(key, pieces, [rows[piece.feed] for piece in pieces])
        return self._call


class _Call:
    """A native step as C structs, made once for as long as the same rows add as many tokens."""

    def __init__(self, key: object, pieces: Sequence[Piece], rows: Sequence[CpuRow]) -> None:
        self.key = key
        self._rows = rows
        made = [
            SegmentStruct(row.caches, row.first_cache, row.frequencies, row.length, piece.size)
            for row, piece in zip(rows, pieces, strict=True)
        ]
        segments = (SegmentStruct * len(pieces))(*made)
        self._segments = list(segments)
        wanted: list[int] = []
        places: list[int] = []
        first = 0
        for piece in pieces:
            wanted += [first + index for index in piece.wanted]
            places += range(piece.place, piece.place + len(piece.wanted))
            first += piece.size
        self._tokens = integers([0] * first)
        self._step = StepStruct(
            segments=segments,
            tokens=self._tokens,
            wanted=integers(wanted),
            places=integers(places),
            num_segments=len(pieces),
            num_tokens=first,
            num_wanted=len(wanted),
        )

    def fill(self, tokens: Sequence[int], logits: Array) -> StepStruct:
        """The step that feeds these tokens to the rows as they stand."""
        self._tokens[:] = tokens
        for segment, row in zip(self._segments, self._rows, strict=True):
            segment.start = row.length
        self._step.logits = _address(logits)
        return self._step


def _empty(rows: int, columns: int) -> Array:
    """Float32 `[rows, columns]`: of numpy, which loads fast, of torch where numpy is absent."""
    if find_spec("numpy") is not None:
        import numpy as np

        return np.empty((rows, columns), dtype=np.float32)
    import torch

    return torch.empty(rows, columns, dtype=torch.float32)


def _address(array: Array) -> int:
    address: int = array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data
    return address
