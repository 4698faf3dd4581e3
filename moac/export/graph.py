"""The decoder as an ONNX graph: one chunk of tokens in, logits and updated span caches out.

The same numbers as `moac_runtime.decoder` and `moac_runtime.session`: a chunk attends to what the
caches held before it and to itself, and is then written to its slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx import GraphProto, TensorProto

from moac.export.builder import Builder
from moac_runtime.errors import UsageError
from moac_runtime.onnx_layout import CacheLayout, OnnxLayout, SpanKind
from moac_runtime.spec import ModelSpec

FLOAT, HALF, INT32, INT64 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT32,
    TensorProto.INT64,
)
KINDS = {"float32": FLOAT, "float16": HALF}

_FOREVER = 2**31 - 1  # no query comes so late


@dataclass(frozen=True, slots=True)
class Weights:
    """Where weights come from. `tensor(b, name)`: the value of a weight in the graph's dtype.

    `rows(b, name, index)`: some rows of a matrix. `linear(b, x, name, bias)`: `x` times the
    transposed matrix `name`, plus the vector `bias` unless None.
    """

    tensor: Callable[[Builder, str], str]
    rows: Callable[[Builder, str, str], str]
    linear: Callable[[Builder, str, str, str | None], str]


@dataclass(frozen=True, slots=True)
class _Span:
    """What caches of one kind share in a step.

    `mask`: additive float32 `[B, 1, 1, T, S + T]`; `source`: `[B, T]`, the token of the chunk
    whose key and value each token's slot gets; `slots`: `[B, T]`.
    """

    mask: str
    source: str
    slots: str
    size: str


def build_graph(spec: ModelSpec, layout: OnnxLayout, weights: Weights) -> GraphProto:
    """The graph of `layout`; its inputs and outputs stand in docs/ONNX.md."""
    return _Graph(spec, layout, weights).build()


class _Graph:
    def __init__(self, spec: ModelSpec, layout: OnnxLayout, weights: Weights) -> None:
        self._b = Builder()
        self._spec = spec
        self._layout = layout
        self._weights = weights
        self._kind = KINDS[layout.dtype]

    def build(self) -> GraphProto:
        b = self._b
        self._declare()
        with b.scope("step"):
            self._measure()
            self._rotate()
            self._spans = [self._span(i, kind) for i, kind in enumerate(self._layout.spans)]
        x = self._weights.rows(b, "embed.weight", b.op("Reshape", "tokens", b.ints(-1)))
        for layer in range(self._spec.num_layers):
            with b.scope(f"layers.{layer}"):
                x = b.op("Add", x, self._attention(layer, x))
                x = b.op("Add", x, self._mlp(layer, x))
        self._write(x)
        self._logits(x)
        return b.graph("moac")

    # ---- the interface

    def _declare(self) -> None:
        b = self._b
        b.input("tokens", INT64, ["batch", "chunk"])
        b.input("past_lengths", INT64, ["batch"])
        b.input("counts", INT64, ["batch"])
        b.input("wanted", INT64, ["wanted"])
        b.input("inv_freq", FLOAT, [self._spec.head_dim // 2])
        b.input("sinks", INT64, [len(self._layout.spans)])
        for cache in self._layout.caches:
            for part in ("key", "value"):
                b.input(f"past.{cache.name}.{part}", self._kind, self._cache_shape(cache))
        self._new: dict[str, tuple[str, str]] = {}

    def _cache_shape(self, cache: CacheLayout) -> list[int | str]:
        return ["batch", cache.num_heads, f"span_{cache.span}", self._spec.head_dim]

    def _logits(self, x: str) -> None:
        b = self._b
        with b.scope("head"):
            x = self._norm(b.op("Gather", x, "wanted", axis=0), "norm.weight")
            head = "embed.weight" if self._spec.tied_embeddings else "lm_head.weight"
            logits = self._as(FLOAT, self._weights.linear(b, x, head, None))
        b.op("Identity", logits, name="logits")
        b.output("logits", FLOAT, ["wanted", self._spec.vocab_size])

    # ---- what depends on the step alone

    def _measure(self) -> None:
        """Sizes and positions of the step."""
        b = self._b
        self._chunk = b.op("Shape", "tokens", start=1, end=2)
        self._places = self._range(self._chunk)
        self._start = b.op("Unsqueeze", "past_lengths", b.ints(1))
        self._stop = b.op("Add", self._start, b.op("Unsqueeze", "counts", b.ints(1)))
        self._positions = b.op("Add", self._start, self._places)
        # All padding of a row goes to the slot behind its last token. What stands there is out of
        # every later query's sight, so nothing is lost.
        self._written = b.op("Min", self._positions, self._stop)

    def _range(self, stop: str) -> str:
        """0 to `stop - 1`, `stop` being `[1]`."""
        b = self._b
        return b.op("Range", b.number(0, INT64), b.op("Squeeze", stop), b.number(1, INT64))

    def _rotate(self) -> None:
        """Cosines and sines `[B * T, 1, D]`; the sines' first half negated (see Rotation)."""
        b, scaling = self._b, self._spec.rope.scaling
        place = b.op("Cast", b.op("Reshape", self._positions, b.ints(-1, 1, 1)), to=FLOAT)
        angle = b.op("Mul", place, "inv_freq")
        cos, sin = (
            b.op("Mul", b.op(kind, angle), b.number(scaling))
            if scaling != 1
            else b.op(kind, angle)
            for kind in ("Cos", "Sin")
        )
        self._cos = self._as(self._kind, b.op("Concat", cos, cos, axis=-1))
        self._sin = self._as(self._kind, b.op("Concat", b.op("Neg", sin), sin, axis=-1))

    def _span(self, index: int, kind: SpanKind) -> _Span:
        b = self._b
        cache = next(c for c in self._layout.caches if c.span == index)
        with b.scope(f"span_{index}"):
            size = b.op("Shape", f"past.{cache.name}.key", start=2, end=3)
            sink = b.op("Gather", "sinks", b.ints(index))
            ring = b.op("Sub", size, sink)
            held = self._held_until(size, sink, ring, kind.window)
            return _Span(
                mask=self._mask(held, self._until(self._positions, sink, ring, kind.window)),
                source=self._source(sink, ring),
                slots=self._slot(self._written, sink, ring),
                size=size,
            )

    def _until(self, positions: str, sink: str, ring: str, window: int | None) -> str:
        """The first query that no longer sees the key at each of `positions`."""
        b = self._b
        pinned = b.op("Less", positions, sink)
        until = b.op("Where", pinned, b.ints(_FOREVER), b.op("Add", positions, ring))
        if window is None:
            return until
        return b.op("Min", until, b.op("Add", positions, b.ints(window)))

    def _held_until(self, size: str, sink: str, ring: str, window: int | None) -> str:
        """`_until` of the key in each slot `[B, S]`, 0 (no query at all) where it is empty."""
        b = self._b
        slot = self._range(size)
        last = b.op("Sub", self._start, b.ints(1))
        pinned = b.op("Less", slot, sink)
        back = b.op("Mod", b.op("Sub", last, slot), ring)
        position = b.op("Where", pinned, slot, b.op("Sub", last, back))
        least = b.op("Where", pinned, b.ints(0), sink)
        empty = b.op("Or", b.op("Less", position, least), b.op("Less", last, position))
        return b.op("Where", empty, b.ints(0), self._until(position, sink, ring, window))

    def _mask(self, held_until: str, own_until: str) -> str:
        b = self._b
        query = b.op("Cast", b.op("Unsqueeze", self._positions, b.ints(1, 2, 4)), to=INT32)
        own = b.op("Cast", b.op("Unsqueeze", own_until, b.ints(1, 2, 3)), to=INT32)
        held = b.op("Cast", b.op("Unsqueeze", held_until, b.ints(1, 2, 3)), to=INT32)
        key = b.op("Cast", b.op("Unsqueeze", self._positions, b.ints(1, 2, 3)), to=INT32)
        causal = b.op("LessOrEqual", key, query)
        seen_own = b.op("And", causal, b.op("Less", query, own))
        seen = b.op("Concat", b.op("Less", query, held), seen_own, axis=-1)
        return b.op("Where", seen, b.number(0.0), b.number(float("-inf")))

    def _slot(self, positions: str, sink: str, ring: str) -> str:
        b = self._b
        in_ring = b.op("Add", sink, b.op("Mod", b.op("Sub", positions, sink), ring))
        return b.op("Where", b.op("Less", positions, sink), positions, in_ring)

    def _source(self, sink: str, ring: str) -> str:
        """The last token of the chunk that shares each token's slot, `[B, T]`.

        A token that falls out of the span within its own chunk writes what replaces it, so that a
        slot written twice gets the same bytes twice.
        """
        b = self._b
        own = b.op("Sub", self._written, self._start)
        last = b.op("Sub", self._stop, b.ints(1))
        turns = b.op("Div", b.op("Sub", last, self._written), ring)
        real = b.op("Less", self._written, self._stop)
        replaced = b.op("And", real, b.op("GreaterOrEqual", self._written, sink))
        return b.op("Where", replaced, b.op("Add", own, b.op("Mul", turns, ring)), own)

    # ---- layers

    def _attention(self, layer: int, x: str) -> str:
        b, spec = self._b, self._spec
        heads = spec.num_heads + spec.num_kv_heads
        qkv = self._linear(
            f"layers.{layer}.qkv", self._norm(x, f"layers.{layer}.attn_norm.weight"), spec.qkv_bias
        )
        qkv = b.op("Reshape", qkv, b.ints(0, heads + spec.num_kv_heads, spec.head_dim))
        qk, v = b.ops("Split", qkv, b.ints(heads, spec.num_kv_heads), outputs=2, axis=1)
        if spec.qk_norm:
            qk = self._qk_norm(layer, qk)
        caches = [cache for cache in self._layout.caches if cache.layer == layer]
        queries, keys = self._by_cache(self._rotated(qk), caches, queries=True)
        values = self._by_cache(v, caches, queries=False)[1]
        parts = [
            self._attend(*arguments)
            for arguments in zip(caches, queries, keys, values, strict=True)
        ]
        out = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=1)
        return self._linear(f"layers.{layer}.o", out, spec.o_bias)

    def _by_cache(
        self, x: str, caches: Sequence[CacheLayout], *, queries: bool
    ) -> tuple[list[str], list[str]]:
        """`x` `[M, heads, D]` cut into each cache's share of query heads, then of KV heads."""
        b, counts = self._b, [cache.num_heads for cache in caches]
        shares = [n * self._spec.group_size for n in counts] if queries else []
        if len(shares) + len(counts) == 1:
            return [], [x]
        cut = b.ops(
            "Split", x, b.ints(*shares, *counts), outputs=len(shares) + len(counts), axis=1
        )
        return cut[: len(shares)], cut[len(shares) :]

    def _rotated(self, x: str) -> str:
        b = self._b
        half = self._spec.head_dim // 2
        low, high = b.ops("Split", x, b.ints(half, half), outputs=2, axis=-1)
        turned = b.op("Mul", b.op("Concat", high, low, axis=-1), self._sin)
        return b.op("Add", b.op("Mul", x, self._cos), turned)

    def _qk_norm(self, layer: int, qk: str) -> str:
        b, spec = self._b, self._spec
        sizes = b.ints(spec.num_heads, spec.num_kv_heads)
        q, k = b.ops("Split", qk, sizes, outputs=2, axis=1)
        q = self._norm(q, f"layers.{layer}.q_norm.weight")
        return b.op("Concat", q, self._norm(k, f"layers.{layer}.k_norm.weight"), axis=1)

    def _attend(self, cache: CacheLayout, q: str, k: str, v: str) -> str:
        """What one cache's heads attend to, `[M, n * G * D]`.

        Held and own keys are scored apart, so that no cache is copied.
        """
        b, span, dim = self._b, self._spans[cache.span], self._spec.head_dim
        group, n = self._spec.group_size, cache.num_heads
        with b.scope(f"heads.{cache.first_head}"):
            q = self._queries(q, n)
            k, v = (b.op("Reshape", x, self._by_row(n, dim)) for x in (k, v))
            self._new[cache.name] = (k, v)
            k, v = (b.op("Transpose", x, perm=[0, 2, 1, 3]) for x in (k, v))
            old_k, old_v = f"past.{cache.name}.key", f"past.{cache.name}.value"
            scores = [
                b.op("MatMul", q, b.op("Transpose", keys, perm=[0, 1, 3, 2]))
                for keys in (old_k, k)
            ]
            shares = self._softmax(b.op("Concat", *scores, axis=-1), span, n)
            sizes = b.op("Concat", span.size, self._chunk, axis=0)
            old, new = b.ops("Split", shares, sizes, outputs=2, axis=-1)
            out = b.op("Add", b.op("MatMul", old, old_v), b.op("MatMul", new, v))
            out = b.op("Reshape", out, self._split_group(n, dim))
            out = b.op("Transpose", out, perm=[0, 3, 1, 2, 4])
            return b.op("Reshape", out, b.ints(-1, n * group * dim))

    def _queries(self, q: str, n: int) -> str:
        """`[M, n * G, D]` to scaled `[B, n, G * T, D]`: a group shares each key it reads."""
        b, dim, group = self._b, self._spec.head_dim, self._spec.group_size
        scale = b.number(dim**-0.5, self._kind)
        q = b.op("Reshape", b.op("Mul", q, scale), self._by_row(n, group, dim))
        q = b.op("Transpose", q, perm=[0, 2, 3, 1, 4])
        return b.op("Reshape", q, b.ints(0, n, -1, dim))

    def _by_row(self, *sizes: int) -> str:
        """The shape `[B, T, *sizes]`."""
        b = self._b
        return b.op("Concat", b.op("Shape", "tokens"), b.ints(*sizes), axis=0)

    def _split_group(self, n: int, last: int) -> str:
        """The shape `[B, n, G, T, last]`."""
        b = self._b
        batch_heads = b.ints(0, n, self._spec.group_size)
        return b.op("Concat", batch_heads, self._chunk, b.ints(last), axis=0)

    def _softmax(self, scores: str, span: _Span, n: int) -> str:
        b = self._b
        scores = b.op("Reshape", self._as(FLOAT, scores), self._split_group(n, -1))
        shares = b.op("Softmax", b.op("Add", scores, span.mask), axis=-1)
        flat = b.op("Concat", b.ints(0, n, -1), b.op("Add", span.size, self._chunk), axis=0)
        return self._as(self._kind, b.op("Reshape", shares, flat))

    def _mlp(self, layer: int, x: str) -> str:
        b, spec, name = self._b, self._spec, f"layers.{layer}"
        both = self._linear(
            f"{name}.gate_up", self._norm(x, f"{name}.mlp_norm.weight"), spec.mlp_bias
        )
        gate, up = b.ops("Split", both, outputs=2, num_outputs=2, axis=-1)
        return self._linear(f"{name}.down", b.op("Mul", self._activated(gate), up), spec.mlp_bias)

    def _activated(self, x: str) -> str:
        b, kind = self._b, self._spec.activation
        if kind in ("silu", "swish"):
            return b.op("Mul", x, b.op("Sigmoid", x))
        if kind == "gelu":
            return b.op("Gelu", x)
        if kind in ("gelu_new", "gelu_pytorch_tanh"):
            return b.op("Gelu", x, approximate="tanh")
        if kind == "relu":
            return b.op("Relu", x)
        raise UsageError(
            f"the activation {kind!r} has no ONNX graph here, expected silu, gelu or relu; "
            "leave onnx out of --target"
        )

    def _linear(self, name: str, x: str, bias: bool) -> str:
        return self._weights.linear(self._b, x, f"{name}.weight", f"{name}.bias" if bias else None)

    def _norm(self, x: str, name: str) -> str:
        b = self._b
        wide = self._as(FLOAT, x)
        mean = b.op("ReduceMean", b.op("Mul", wide, wide), b.ints(-1), keepdims=1)
        root = b.op("Sqrt", b.op("Add", mean, b.number(self._spec.norm_eps)))
        return b.op(
            "Mul", self._weights.tensor(b, name), self._as(self._kind, b.op("Div", wide, root))
        )

    def _as(self, kind: int, x: str) -> str:
        """`x`, which is float32 or of the graph's dtype, as element type `kind`."""
        return x if self._kind == FLOAT else self._b.op("Cast", x, to=kind)

    # ---- the ring write

    def _write(self, hidden: str) -> None:
        """Write every cache once all layers have read theirs.

        The slots are made to depend on the last layer's size, so that no order of execution can
        write before the last read: a client may bind one buffer as input and output.
        """
        b = self._b
        with b.scope("write"):
            tokens = b.op("Shape", b.op("Reshape", "tokens", b.ints(-1)))
            none = b.op("Sub", b.op("Shape", hidden, start=0, end=1), tokens)
            made: dict[tuple[int, int], str] = {}
            for cache in self._layout.caches:
                key = (cache.span, cache.num_heads)
                if key not in made:
                    made[key] = self._indices(cache, none)
                self._write_cache(cache, made[key])

    def _indices(self, cache: CacheLayout, none: str) -> str:
        """`[B, T, n, 3]`: row, head and slot of each key of the chunk."""
        b, n = self._b, cache.num_heads
        batch = b.op("Shape", "tokens", start=0, end=1)
        slots = b.op("Add", self._spans[cache.span].slots, none)
        parts = (
            b.op("Unsqueeze", self._range(batch), b.ints(1, 2, 3)),
            b.op("Reshape", b.ints(*range(n)), b.ints(1, 1, n, 1)),
            b.op("Unsqueeze", slots, b.ints(2, 3)),
        )
        return b.op("Concat", *(b.op("Expand", p, self._by_row(n, 1)) for p in parts), axis=-1)

    def _write_cache(self, cache: CacheLayout, indices: str) -> None:
        b = self._b
        source = b.op("Unsqueeze", self._spans[cache.span].source, b.ints(2))
        for part, new in zip(("key", "value"), self._new[cache.name], strict=True):
            name = f"present.{cache.name}.{part}"
            tokens = b.op("GatherND", new, source, batch_dims=1)
            b.op("ScatterND", f"past.{cache.name}.{part}", indices, tokens, name=name)
            b.output(name, self._kind, self._cache_shape(cache))
