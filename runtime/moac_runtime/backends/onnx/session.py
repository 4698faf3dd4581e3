"""A session over the ONNX graph: numpy arrays as caches, written in place by onnxruntime.

Nothing here needs torch. Each cache's array is bound both as the graph's input and as its output,
so a step copies and allocates none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from moac_runtime.backends.feeding import check_growth, check_sizes, num_wanted, wanted_of
from moac_runtime.backends.fixed import FixedRow, FixedRows
from moac_runtime.backends.layout import packed_spans, rope_tables
from moac_runtime.backends.onnx.layout import ONNX_LAYOUT, OnnxLayout, frequency_inputs
from moac_runtime.backends.session import Feed, Snapshot
from moac_runtime.errors import ArtifactError, UsageError
from moac_runtime.host.cores import default_threads
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.integrity import REMEDY
from moac_runtime.package.manifest import read_json
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import HeadSpan
from moac_runtime.package.spec import RopeSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# Tokens of a row that share a step: enough to use the cores, few enough that scores stay small.
CHUNK = 256


class OnnxGraph:
    """A package's graph opened by onnxruntime on the CPU; it holds weights and no state.

    `ropes`: the model's rotary tables. `threads`: None is every core this process may use.
    Raises ArtifactError where it refuses the file.
    """

    def __init__(
        self,
        path: Path,
        layout: OnnxLayout,
        ropes: Sequence[RopeSpec],
        *,
        threads: int | None = None,
    ) -> None:
        self.layout = layout
        self.ropes = ropes
        self.dtype: Any = np.dtype(layout.dtype)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # chunks differ in length, and a pattern kept for each would keep its memory too
        options.enable_mem_pattern = False
        # its search takes time that grows with the square of the graph's nodes
        options.enable_mem_reuse = False
        options.intra_op_num_threads = threads or default_threads()
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises its own kinds, and bare RuntimeError
            reason = " ".join(str(error).split())
            raise ArtifactError(
                f"onnxruntime {onnxruntime.__version__} cannot open {path.name} ({reason}), "
                f"expected a graph of opset {layout.opset}: upgrade onnxruntime or compile the "
                "package again"
            ) from error

    def binding(self) -> Any:
        """A fresh set of inputs and outputs."""
        return self._session.io_binding()

    def run(self, binding: Any) -> None:
        """Run one step on what is bound."""
        self._session.run_with_iobinding(binding)


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A package's graph, a `Backend`."""

    graph: OnnxGraph
    head_order: Sequence[Sequence[int]]
    kernels = None

    @property
    def dtype(self) -> str:
        """Of caches, by name."""
        return self.graph.layout.dtype

    def session(self, plan: Plan | None = None) -> OnnxSession:
        """A session without rows, under the graph's own plan or another one."""
        return OnnxSession(self.graph, plan, self.head_order)


def open_onnx(artifact: Artifact, *, threads: int | None = None) -> OnnxModel:
    """The graph of a package built for `onnx`. Raises ArtifactError."""
    data = read_json(artifact.path(ONNX_LAYOUT), ONNX_LAYOUT)
    try:
        layout = OnnxLayout.from_json(data)
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{ONNX_LAYOUT} describes no graph ({error!r}), expected its caches: {REMEDY}"
        ) from error
    graph = OnnxGraph(artifact.path(layout.model), layout, artifact.spec.ropes, threads=threads)
    return OnnxModel(graph, artifact.head_order)


class OnnxSession(FixedRows):
    """See `backends.session.Session`: a fixed batch over the graph's span caches.

    `plan`: None is the one that the graph was made for; `head_order[layer][position]`: the
    checkpoint's KV head packed at that position. `chunk`: tokens of a row that share a step.
    Raises UsageError for a chunk below one.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        plan: Plan | None,
        head_order: Sequence[Sequence[int]],
        *,
        chunk: int = CHUNK,
    ) -> None:
        check_sizes(chunk=chunk)
        super().__init__(graph.layout.vocab_size, (graph, plan, head_order))
        self._graph, self._plan, self._head_order = graph, plan, head_order
        self._chunk = chunk
        self._spans: list[HeadSpan] = []
        self._frequencies: dict[str, Array] = {}
        self._caches: dict[str, Array] = {}
        self._decoding: dict[tuple[int, int], _Step] = {}  # by first place and number of rows

    def step(self, feeds: Sequence[Feed]) -> Array:
        """Feed some rows; float32 logits `[sum of wanted, V]`.

        Raises UsageError for feeds that cannot be meant and MoacError where a row would pass its
        capacity, before anything is fed.
        """
        rows = self._check_feeds(feeds)
        self._begin_once()
        logits = np.empty((num_wanted(feeds), self._vocab_size), dtype=np.float32)
        begins = list(accumulate((len(wanted_of(feed)) for feed in feeds), initial=0))
        for group in _groups(feeds, rows):
            count = len(feeds[group[0]].tokens)
            for first in range(0, count, self._chunk):
                stop = min(first + self._chunk, count)
                flat, places = [], []
                for number, index in enumerate(group):
                    for place, asked in enumerate(wanted_of(feeds[index]), begins[index]):
                        if first <= asked < stop:
                            flat.append(number * (stop - first) + asked - first)
                            places.append(place)
                tokens = [feeds[index].tokens[first:stop] for index in group]
                part = self._run([rows[index] for index in group], tokens, flat)
                logits[places] = part
        return logits

    def snapshot(self, row: int) -> Snapshot:
        """A copy of the row. Raises UsageError for one that is not there."""
        found = self._row(row)
        content = found.content
        if self._begun:
            content = {name: cache[found.place].copy() for name, cache in self._caches.items()}
        size = sum(part.nbytes for part in (content or {}).values())
        return Snapshot(size, found.length, found.capacity, self._origin, content)

    def grow(self, row: int, capacity: int) -> None:
        """Refused, since the graph knows of no tokens that were lost: raises UsageError."""
        check_growth(self._row(row).capacity, capacity)
        raise UsageError(
            "rows of an ONNX graph cannot grow; admit them with a larger capacity, or run with "
            "--backend torch"
        )

    def kv_bytes(self, row: int | None = None) -> int:
        """Bytes of keys and values: of a row, or allocated for all that are present."""
        if row is not None:
            return self._row_bytes(self._row(row).capacity)
        if self._begun:
            return sum(cache.nbytes for cache in self._caches.values())
        return sum(self._row_bytes(present.capacity) for present in self._by_number.values())

    # ---- the batch ----

    def _check_batch(self, batch: int, capacity: int) -> None:
        self._spans_at(capacity)

    def _begin(self, rows: list[FixedRow]) -> None:
        capacity, layout = rows[0].capacity, self._graph.layout
        self._spans = self._spans_at(capacity)
        tables = rope_tables(self._graph.ropes, layout.head_dim, capacity)
        inputs = frequency_inputs(len(tables))
        self._frequencies = {
            name: np.array(table, dtype=np.float32)
            for name, table in zip(inputs, tables, strict=True)
        }
        self._caches = dict(self._new_caches(len(rows)))
        for row in rows:
            for name, part in (row.content or {}).items():
                self._caches[name][row.place] = part

    def _row_left(self, row: FixedRow) -> None:
        """Close the gap that the row leaves."""
        self._decoding = {}
        kept = [present.place for present in self._by_number.values()]
        for name in self._caches:
            self._caches[name] = self._caches[name][kept]
        for place, present in enumerate(self._by_number.values()):
            present.place = place

    def _end(self) -> None:
        self._decoding, self._caches = {}, {}

    def _spans_at(self, capacity: int) -> list[HeadSpan]:
        """The spans of the layout's kinds. Raises UsageError for a plan the graph cannot serve."""
        layout = self._graph.layout
        if self._plan is None:
            return layout.resolve(capacity)
        return layout.under(packed_spans(self._plan, self._head_order, capacity))

    def _row_bytes(self, capacity: int) -> int:
        layout, spans = self._graph.layout, self._spans_at(capacity)
        slots = sum(cache.num_heads * spans[cache.span].size for cache in layout.caches)
        return 2 * slots * layout.head_dim * int(self._graph.dtype.itemsize)

    def _new_caches(self, batch: int) -> Iterator[tuple[str, Array]]:
        layout = self._graph.layout
        for cache in layout.caches:
            size = self._spans[cache.span].size
            shape = (batch, cache.num_heads, size, layout.head_dim)
            for part in ("key", "value"):
                # zeros, not empty: a masked slot weighs nothing, but NaN times nothing is NaN
                yield f"{cache.name}.{part}", np.zeros(shape, dtype=self._graph.dtype)

    # ---- steps ----

    def _run(
        self, rows: Sequence[FixedRow], tokens: Sequence[Sequence[int]], wanted: Sequence[int]
    ) -> Array:
        """One step of adjacent rows, equally many tokens each; logits of the `wanted` ones.

        `wanted`: indices into the rows' tokens, one row's after another's.
        """
        fed = np.array(tokens, dtype=np.int64)
        lengths = np.array([row.length for row in rows], dtype=np.int64)
        if fed.shape[1] == 1:
            logits = self._decode_step(rows).run(fed, lengths)[list(wanted)]
        else:
            # a graph that computes no logits is one more case for every runtime: ask for one
            asked = np.array(wanted or [0], dtype=np.int64)
            logits = self._step(rows, asked, fed.shape[1]).run(fed, lengths)[: len(wanted)]
        for row in rows:
            row.length += fed.shape[1]
        return logits

    def _decode_step(self, rows: Sequence[FixedRow]) -> _Step:
        """The step of one token of these rows, bound once."""
        key = rows[0].place, len(rows)
        if key not in self._decoding:
            self._decoding[key] = self._step(rows, np.arange(len(rows), dtype=np.int64), 1)
        return self._decoding[key]

    def _step(self, rows: Sequence[FixedRow], wanted: Array, count: int) -> _Step:
        first = rows[0].place
        caches = {name: cache[first : first + len(rows)] for name, cache in self._caches.items()}
        sinks = np.array([head.sink for head in self._spans], dtype=np.int64)
        return _Step(self._graph, caches, sinks, self._frequencies, wanted, count)


def _groups(feeds: Sequence[Feed], rows: Sequence[FixedRow]) -> Iterator[list[int]]:
    """The feeds that share a step: of adjacent rows that take equally many tokens.

    Where these are several, the rows also stand alike.
    """
    group: list[int] = []
    for index in sorted(range(len(feeds)), key=lambda index: rows[index].place):
        if group and not _join(feeds, rows, group[-1], index):
            yield group
            group = []
        group.append(index)
    yield group


def _join(feeds: Sequence[Feed], rows: Sequence[FixedRow], a: int, b: int) -> bool:
    count = len(feeds[b].tokens)
    alike = count == 1 or rows[a].length == rows[b].length
    return alike and rows[b].place == rows[a].place + 1 and len(feeds[a].tokens) == count


class _Step:
    """Inputs and outputs of one shape, bound once: running it again fills the same buffers."""

    def __init__(
        self,
        graph: OnnxGraph,
        caches: dict[str, Array],
        sinks: Array,
        frequencies: dict[str, Array],
        wanted: Array,
        count: int,
    ) -> None:
        rows = len(next(iter(caches.values())))
        self._graph = graph
        self._tokens = np.zeros((rows, count), dtype=np.int64)
        self._past = np.zeros(rows, dtype=np.int64)
        self._logits = np.empty((len(wanted), graph.layout.vocab_size), dtype=np.float32)
        self._binding = graph.binding()
        self._inputs = {
            "tokens": self._tokens,
            "past_lengths": self._past,
            "counts": np.full(rows, count, dtype=np.int64),
            "wanted": wanted,
            "sinks": sinks,
            **frequencies,
        }
        for name, array in self._inputs.items():
            self._binding.bind_ortvalue_input(name, _value(array))
        self._binding.bind_ortvalue_output("logits", _value(self._logits))
        for name, cache in caches.items():
            self._binding.bind_ortvalue_input(f"past.{name}", _value(cache))
            self._binding.bind_ortvalue_output(f"present.{name}", _value(cache))

    def run(self, tokens: Array, lengths: Array) -> Array:
        """Logits `[wanted, V]` of `tokens` `[rows, T]`; the next run overwrites them."""
        self._tokens[:] = tokens
        self._past[:] = lengths
        self._graph.run(self._binding)
        return self._logits


def _value(array: Array) -> Any:
    """The array as onnxruntime sees it: the same memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
