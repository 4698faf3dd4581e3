"""A session over the ONNX graph: numpy arrays as caches, written in place by onnxruntime.

The interface of `session.Session` without torch. Each cache's array is bound both as the graph's
input and as its output, so a step copies and allocates none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from moac_runtime.backends.onnx.layout import ONNX_LAYOUT, OnnxLayout
from moac_runtime.backends.rows import Rows
from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.host.cores import default_threads
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.integrity import REMEDY
from moac_runtime.package.manifest import read_json
from moac_runtime.package.span import HeadSpan
from moac_runtime.package.spec import RopeSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# Tokens of a row that share a step: enough to use the cores, few enough that scores stay small.
CHUNK = 256


class OnnxGraph:
    """A package's graph opened by onnxruntime on the CPU; it holds weights and no state.

    `threads`: None is every core this process may use. Raises ArtifactError where it refuses
    the file.
    """

    def __init__(
        self, path: Path, layout: OnnxLayout, rope: RopeSpec, *, threads: int | None = None
    ) -> None:
        self.layout = layout
        self.rope = rope
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


def open_graph(artifact: Artifact, *, threads: int | None = None) -> OnnxGraph:
    """The graph of a package built for `onnx`. Raises ArtifactError."""
    data = read_json(artifact.path(ONNX_LAYOUT), ONNX_LAYOUT)
    try:
        layout = OnnxLayout.from_json(data)
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{ONNX_LAYOUT} describes no graph ({error!r}), expected its caches: {REMEDY}"
        ) from error
    (rope,) = artifact.spec.ropes
    return OnnxGraph(artifact.path(layout.model), layout, rope, threads=threads)


class OnnxSession(Rows):
    """`batch` sequences of at most `capacity` tokens each, over the graph's span caches.

    `spans`: one for each kind of the layout, None the planned ones. Raises UsageError for a batch,
    capacity or chunk below one.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        *,
        batch: int,
        capacity: int,
        chunk: int = CHUNK,
        spans: Sequence[HeadSpan] | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("capacity", capacity), ("chunk", chunk)):
            if value < 1:
                raise UsageError(f"{name} is {value}, expected at least 1; give a positive {name}")
        self._graph = graph
        self._capacity = capacity
        self._chunk = chunk
        self._lengths = np.zeros(batch, dtype=np.int64)
        self._spans = list(spans or graph.layout.resolve(capacity))
        self._sinks = np.array([head.sink for head in self._spans], dtype=np.int64)
        self._frequencies = rope_frequencies(graph.rope, graph.layout.head_dim, capacity)
        self._caches = dict(self._new_caches(batch))
        self._decoding: _Step | None = None

    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, all layers, heads and rows."""
        return sum(cache.nbytes for cache in self._caches.values())

    def extend(self, tokens: Sequence[Sequence[int]]) -> Array:
        """Feed each row its `tokens`; float32 logits `[B, V]` after the last token of each row.

        Rows may differ in number and may get none (their logits are NaN). Raises UsageError for
        tokens that are none, MoacError where a row would pass the capacity; nothing is fed then.
        """
        logits = self.extend_at(tokens, [[len(row) - 1] if row else [] for row in tokens])
        absent = np.full((1, self._graph.layout.vocab_size), np.nan, dtype=np.float32)
        return np.concatenate([row if len(row) else absent for row in logits])

    def extend_at(
        self, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> list[Array]:
        """Feed each row its `tokens`; float32 logits `[len(wanted[b]), V]` per row.

        `wanted[b]`: ascending indices into `tokens[b]`. Raises as `extend` does.
        """
        self._check_rows(len(tokens))
        for fed in tokens:
            self._check_vocabulary(fed)
        self._check_room([len(row) for row in tokens])
        begin = self.lengths
        found: list[list[Array]] = [
            [np.empty((0, self._graph.layout.vocab_size), np.float32)] for _ in tokens
        ]
        for rows, count in self._shares([len(row) for row in tokens]):
            first = int(self._lengths[rows.start]) - begin[rows.start]
            chunk = [tokens[row][first : first + count] for row in range(rows.start, rows.stop)]
            places = [
                [index - first for index in wanted[row] if first <= index < first + count]
                for row in range(rows.start, rows.stop)
            ]
            logits = self._feed(rows, np.array(chunk, dtype=np.int64), places)
            for row, part in zip(range(rows.start, rows.stop), logits, strict=True):
                found[row].append(part)
        return [np.concatenate(parts) for parts in found]

    def decode(self, tokens: Sequence[int] | Array) -> Array:
        """Feed each row one token, `[B]`; float32 logits `[B, V]`. Raises as `extend`."""
        fed = np.asarray(tokens, dtype=np.int64)
        self._check_rows(len(fed))
        self._check_vocabulary(fed)
        self._check_room([1] * self.batch)
        if self._decoding is None:
            everyone = slice(0, self.batch)
            self._decoding = self._step(everyone, np.arange(self.batch, dtype=np.int64), 1)
        logits = self._decoding.run(fed[:, None], self._lengths)
        self._lengths += 1
        return logits.copy()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; the memory of the others is freed.

        Raises UsageError for no rows and for a row that the batch does not have.
        """
        if not rows or min(rows) < 0 or max(rows) >= self.batch:
            raise UsageError(
                f"cannot keep rows {list(rows)} of a batch of {self.batch}; "
                f"name one or more rows from 0 to {self.batch - 1}"
            )
        self._decoding = None
        for name in self._caches:
            self._caches[name] = self._caches[name][list(rows)]
        self._lengths = self._lengths[list(rows)]

    def _new_caches(self, batch: int) -> Iterator[tuple[str, Array]]:
        layout = self._graph.layout
        for cache in layout.caches:
            size = self._spans[cache.span].size
            shape = (batch, cache.num_heads, size, layout.head_dim)
            for part in ("key", "value"):
                # zeros, not empty: a masked slot weighs nothing, but NaN times nothing is NaN
                yield f"{cache.name}.{part}", np.zeros(shape, dtype=self._graph.dtype)

    def _shares(self, counts: Sequence[int]) -> Iterator[tuple[slice, int]]:
        """Adjacent rows that stand alike and take equally many tokens, chunk by chunk."""
        todo = list(zip(self.lengths, counts, strict=True))
        row = 0
        for (_, count), run in groupby(todo):
            rows = slice(row, row + len(list(run)))
            for first in range(0, count, self._chunk):
                yield rows, min(self._chunk, count - first)
            row = rows.stop

    def _feed(self, rows: slice, tokens: Array, places: Sequence[Sequence[int]]) -> list[Array]:
        """One step of some rows; logits at `places` of each row's tokens, per row."""
        count = tokens.shape[1]
        flat = [count * row + place for row, own in enumerate(places) for place in own]
        # a graph that computes no logits at all is one more case for every runtime: ask for one
        wanted = np.array(flat or [0], dtype=np.int64)
        logits = self._step(rows, wanted, count).run(tokens, self._lengths[rows])[: len(flat)]
        self._lengths[rows] += count
        return np.split(logits, np.cumsum([len(own) for own in places])[:-1])

    def _step(self, rows: slice, wanted: Array, count: int) -> _Step:
        caches = {name: cache[rows] for name, cache in self._caches.items()}
        return _Step(self._graph, caches, self._sinks, self._frequencies, wanted, count)

    def _check_rows(self, found: int) -> None:
        if found != self.batch:
            raise UsageError(
                f"got tokens for {found} rows, expected {self.batch}; give every row of the batch "
                "a list, empty where it adds nothing"
            )

    def _check_vocabulary(self, tokens: Sequence[int] | Array) -> None:
        size = self._graph.layout.vocab_size
        odd = next((token for token in tokens if not 0 <= token < size), None)
        if odd is not None:
            raise UsageError(
                f"got token {odd}, expected tokens from 0 to {size - 1}; "
                "encode the text with the package's own tokenizer"
            )

    def _check_room(self, counts: Sequence[int]) -> None:
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if length + count > self._capacity:
                raise MoacError(
                    f"row {row} holds {length} of {self._capacity} tokens and cannot take "
                    f"{count} more; open the session with a larger capacity"
                )


class _Step:
    """Inputs and outputs of one shape, bound once: running it again fills the same buffers."""

    def __init__(
        self,
        graph: OnnxGraph,
        caches: dict[str, Array],
        sinks: Array,
        frequencies: Array,
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
            "inv_freq": frequencies,
            "sinks": sinks,
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


def rope_frequencies(rope: RopeSpec, head_dim: int, capacity: int) -> Array:
    """The float32 frequencies `[head_dim / 2]` of a session, as `decoder.rope_frequencies`."""
    context = rope.original_context
    if rope.kind != "dynamic" or context is None or capacity <= context:
        return np.array(rope.inv_freq, dtype=np.float32)
    stretch = rope.factor * capacity / context - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: Array = np.reciprocal(np.power(np.float32(theta), exponent))
    return frequencies
