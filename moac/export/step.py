"""What depends on the step alone: positions, rotation, masks and slots, shared by all layers.

Positions are int32, so that masks cost half; K counts the kinds of spans.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from moac.export.builder import Builder
from moac_runtime.backends.layout import rope_scalings
from moac_runtime.backends.onnx.layout import OnnxLayout, frequency_inputs
from moac_runtime.package.spec import ModelSpec, RopeSpec

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64

# No query comes so late, and a sum with a position still fits.
_FOREVER = 2**30


class Step:
    """Values of one step over the graph's inputs. `rotations`: of each rotary table, the cosines
    and sines `[B, 1, T, D]`, the sines' first half negated, so that the halves are swapped and not
    negated.
    """

    def __init__(self, b: Builder, spec: ModelSpec, layout: OnnxLayout, kind: int) -> None:
        self._b = b
        self._spec = spec
        self._layout = layout
        with b.scope("step"):
            self._measure()
            inputs = frequency_inputs(len(spec.ropes))
            self.rotations = [
                self._rotation(*table, kind) for table in zip(spec.ropes, inputs, strict=True)
            ]
            self._place()
            self._masks = self._make_masks()

    # ---- shapes

    def by_row(self, *sizes: int) -> str:
        """The shape `[B, T, *sizes]`."""
        b = self._b
        return b.once(
            ("by_row", *sizes), lambda: b.op("Concat", self._batch_chunk, b.ints(*sizes), axis=0)
        )

    def split_group(self, n: int) -> str:
        """The shape `[B, n, G, T, -1]`, `B` copied."""
        b, group = self._b, self._spec.group_size
        return b.once(
            ("split_group", n),
            lambda: b.op("Concat", b.ints(0, n, group), self._chunk, b.ints(-1), axis=0),
        )

    def join_group(self, span: int) -> str:
        """The shape `[B, n, G * T, S + T]`, `B` and `n` copied."""
        b = self._b

        def make() -> str:
            total = b.op("Shape", self._masks[span], start=4, end=5)
            return b.op("Concat", b.ints(0, 0, -1), total, axis=0)

        return b.once(("join_group", span), make)

    def parts(self, span: int) -> str:
        """`[S, T]`: how many keys are held, and how many are the chunk's own."""
        b = self._b
        return b.once(
            ("parts", span), lambda: b.op("Concat", self._sizes[span], self._chunk, axis=0)
        )

    # ---- sizes and positions

    def mask(self, span: int) -> str:
        """Additive float32 `[B, 1, 1, T, S + T]`: 0 where the query sees the key."""
        return self._masks[span]

    def _measure(self) -> None:
        b, layout = self._b, self._layout
        self._batch_chunk = b.op("Shape", "tokens")
        self._chunk = b.op("Shape", "tokens", start=1, end=2)
        first = [next(c for c in layout.caches if c.span == i) for i in range(len(layout.spans))]
        self._sizes = [b.op("Shape", f"past.{c.name}.key", start=2, end=3) for c in first]
        all_sizes = self._sizes[0] if len(first) == 1 else b.op("Concat", *self._sizes, axis=0)
        self._all_sizes = b.op("Cast", all_sizes, to=INT32)
        self._sinks = b.op("Cast", "sinks", to=INT32)
        self._rings = b.op("Sub", self._all_sizes, self._sinks)
        self._start = b.op("Unsqueeze", b.op("Cast", "past_lengths", to=INT32), b.ints(1))
        counts = b.op("Unsqueeze", b.op("Cast", "counts", to=INT32), b.ints(1))
        self._stop = b.op("Add", self._start, counts)
        self._positions = b.op("Add", self._start, self._range(self._chunk))

    def _range(self, stop: str) -> str:
        """0 to `stop - 1` in int32, `stop` being `[1]` int64."""
        b = self._b
        scalar = b.op("Cast", b.op("Squeeze", stop), to=INT32)
        return b.op("Range", b.number(0, INT32), scalar, b.number(1, INT32))

    def _rotation(self, rope: RopeSpec, frequencies: str, kind: int) -> tuple[str, str]:
        b = self._b
        position = b.op("Cast", b.op("Unsqueeze", self._positions, b.ints(1, 3)), to=FLOAT)
        angle = b.op("Mul", position, frequencies)
        cos, sin = b.op("Cos", angle), b.op("Sin", angle)
        if rope.scaling != 1:
            factors = np.array(rope_scalings(rope, self._spec.head_dim), dtype=np.float32)
            scaling = b.number(rope.scaling) if rope.rotated is None else b.constant(factors)
            cos, sin = (b.op("Mul", x, scaling) for x in (cos, sin))
        cos = b.op("Concat", cos, cos, axis=-1)
        sin = b.op("Concat", b.op("Neg", sin), sin, axis=-1)
        if kind == FLOAT:
            return cos, sin
        return b.op("Cast", cos, to=kind), b.op("Cast", sin, to=kind)

    # ---- slots

    def _place(self) -> None:
        """Each token's slot, and the token of the chunk that its slot gets, `[B, K, T]`.

        A token that falls out of the span within its own chunk writes what replaces it, so that
        a slot written twice gets the same bytes twice. All padding of a row goes to the slot
        behind its last token: what stands there is out of every later query's sight.
        """
        b = self._b
        sink, ring = (b.op("Unsqueeze", x, b.ints(0, 2)) for x in (self._sinks, self._rings))
        self._sink, self._ring = sink, ring
        start, stop = (b.op("Unsqueeze", x, b.ints(1)) for x in (self._start, self._stop))
        at = b.op("Min", b.op("Unsqueeze", self._positions, b.ints(1)), stop)
        pinned = b.op("Less", at, sink)
        in_ring = b.op("Add", sink, b.op("Mod", b.op("Sub", at, sink), ring))
        self._slots = b.op("Cast", b.op("Where", pinned, at, in_ring), to=INT64)
        left = b.op("Sub", b.op("Sub", stop, b.int32(1)), at)  # -1 for padding
        turns = b.op("Div", b.op("Max", left, b.int32(0)), ring)
        moves = b.op("Where", pinned, b.int32(0), b.op("Mul", turns, ring))
        own = b.op("Sub", at, start)
        self._source = b.op("Cast", b.op("Add", own, moves), to=INT64)

    def slots_after(self, value: str) -> str:
        """Every kind's slots `[B, K, T]`, known only when `value` `[B * T, ...]` is."""
        b = self._b
        tokens = b.op("ReduceProd", self._batch_chunk)
        none = b.op("Sub", b.op("Shape", value, start=0, end=1), tokens)
        return b.op("Add", self._slots, none)

    def indices(self, slots: str, kinds: str, heads: Sequence[int]) -> str:
        """`[B, heads, T, 3]`: row, head in its cache, and slot; `kinds`: of each head's span."""
        b = self._b
        slot = b.op("Unsqueeze", b.op("Gather", slots, kinds, axis=1), b.ints(3))
        shape = b.once("head_shape", lambda: b.op("Shape", slot))
        rows = b.once("rows", lambda: self._rows(shape))
        head = b.op("Expand", b.op("Reshape", b.ints(*heads), b.ints(1, -1, 1, 1)), shape)
        return b.op("Concat", rows, head, slot, axis=-1)

    def _rows(self, shape: str) -> str:
        b = self._b
        batch = b.op("Shape", "tokens", start=0, end=1)
        row = b.op("Cast", self._range(batch), to=INT64)
        return b.op("Expand", b.op("Unsqueeze", row, b.ints(1, 2, 3)), shape)

    def source(self, kinds: str) -> str:
        """`[B, heads, T, 1]`: the token whose key each head writes in place of each token's."""
        b = self._b
        return b.op("Unsqueeze", b.op("Gather", self._source, kinds, axis=1), b.ints(3))

    # ---- masks

    def _make_masks(self) -> list[str]:
        b = self._b
        query = b.op("Unsqueeze", self._positions, b.ints(1, 2, 4))
        own, held = self._seen_own(query), self._held_until()
        masks = []
        for own_part, until in zip(own, held, strict=True):
            seen = b.op("Concat", b.op("Less", query, until), own_part, axis=-1)
            masks.append(b.op("Where", seen, b.number(0.0), b.number(float("-inf"))))
        return masks

    def _seen_own(self, query: str) -> list[str]:
        """Each kind's `[B, 1, 1, T, T]`: which keys of the chunk a query sees."""
        b = self._b
        key = b.op("Unsqueeze", self._positions, b.ints(1))
        until = b.op(
            "Where", b.op("Less", key, self._sink), b.int32(_FOREVER), b.op("Add", key, self._ring)
        )
        if self._windows is not None:
            until = b.op(
                "Min", until, b.op("Add", key, b.op("Unsqueeze", self._windows, b.ints(0, 2)))
            )
        causal = b.op("LessOrEqual", b.op("Unsqueeze", key, b.ints(2, 3)), query)
        seen = b.op("And", causal, b.op("Less", query, b.op("Unsqueeze", until, b.ints(2, 3))))
        return self._by_kind(seen, b.constant(np.ones(len(self._sizes), dtype=np.int64)), 1)

    def _held_until(self) -> list[str]:
        """Each kind's `[B, 1, 1, 1, S]`: the first query that no longer sees the key in a slot.

        0, before every query, where the slot is empty. Computed for all kinds in one row.
        """
        b = self._b
        kind, slot = self._flat_slots()
        sink, ring = (b.op("Gather", x, kind) for x in (self._sinks, self._rings))
        last = b.op("Sub", self._start, b.int32(1))
        back = b.op("Mod", b.op("Sub", last, slot), ring)
        position = b.op("Sub", last, back)
        pinned = b.op("Less", slot, sink)
        position = b.op("Where", pinned, slot, position)
        until = b.op("Where", pinned, b.int32(_FOREVER), b.op("Add", position, ring))
        if self._windows is not None:
            window = b.op("Gather", self._windows, kind)
            until = b.op("Min", until, b.op("Add", position, window))
        least = b.op("Where", pinned, b.int32(0), sink)
        inside = b.op(
            "And", b.op("GreaterOrEqual", position, least), b.op("LessOrEqual", position, last)
        )
        until = b.op("Unsqueeze", b.op("Where", inside, until, b.int32(0)), b.ints(1, 2, 3))
        sizes = b.op("Cast", self._all_sizes, to=INT64)
        return self._by_kind(until, sizes, -1)

    def _flat_slots(self) -> tuple[str, str]:
        """Of the slots of all kinds, one after another: their kinds, and their numbers therein."""
        b = self._b
        kinds = [
            b.op("ConstantOfShape", size, value=b.tensor(np.array([i], dtype=np.int32)))
            for i, size in enumerate(self._sizes)
        ]
        kind = kinds[0] if len(kinds) == 1 else b.op("Concat", *kinds, axis=0)
        first = b.op("CumSum", self._all_sizes, b.number(0, INT64), exclusive=1)
        return kind, b.op("Sub", self._range(b.op("Shape", kind)), b.op("Gather", first, kind))

    def _by_kind(self, x: str, sizes: str, axis: int) -> list[str]:
        if len(self._sizes) == 1:
            return [x]
        return self._b.ops("Split", x, sizes, outputs=len(self._sizes), axis=axis)

    @property
    def _windows(self) -> str | None:
        """The kinds' own sliding windows `[K]`, None where there are none at all."""
        windows = [kind.window for kind in self._layout.spans]
        if all(window is None for window in windows):
            return None
        filled = [_FOREVER if window is None else window for window in windows]
        return self._b.constant(np.array(filled, dtype=np.int32))
