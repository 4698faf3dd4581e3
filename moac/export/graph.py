"""The decoder as an ONNX graph: one chunk of tokens in, logits and updated span caches out.

The same numbers as `moac_runtime.backends.torch`: a chunk attends to what the caches held before
it and to itself, and is then written to its slots. What depends on the step alone is computed
once (`step.py`). Runtimes plan memory in time that grows with the square of the nodes, so whatever
can be done for all heads of a layer at once is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from onnx import GraphProto, TensorProto

from moac.export.builder import ELEMENTS, Builder
from moac.export.step import Step
from moac_runtime.backends.onnx.layout import CacheLayout, OnnxLayout, frequency_inputs
from moac_runtime.package.activations import ACTIVATIONS
from moac_runtime.package.spec import ModelSpec, NormSpec

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


@dataclass(frozen=True, slots=True)
class GraphWeights:
    """Where weights come from. `tensor(b, name)`: the value of a weight in the graph's dtype.

    `rows(b, name, index)`: some rows of a matrix. `linear(b, x, name, bias)`: `x` times the
    transposed matrix `name`, plus the vector `bias` unless None.
    """

    tensor: Callable[[Builder, str], str]
    rows: Callable[[Builder, str, str], str]
    linear: Callable[[Builder, str, str, str | None], str]


def build_graph(spec: ModelSpec, layout: OnnxLayout, weights: GraphWeights) -> GraphProto:
    """The graph of `layout`; its inputs and outputs stand in docs/ONNX.md."""
    return _Graph(spec, layout, weights).build()


class _Graph:
    def __init__(self, spec: ModelSpec, layout: OnnxLayout, weights: GraphWeights) -> None:
        self._b = Builder()
        self._spec = spec
        self._layout = layout
        self._weights = weights
        self._kind = ELEMENTS[layout.dtype]

    def build(self) -> GraphProto:
        b = self._b
        self._declare()
        self._step = Step(b, self._spec, self._layout, self._kind)
        x = self._weights.rows(b, "embed.weight", b.op("Reshape", "tokens", b.ints(-1)))
        x = self._scaled(x, self._spec.embedding_scale)
        new = []
        for layer in range(self._spec.num_layers):
            with b.scope(f"layers.{layer}"):
                given = self._given(layer, x, "attn_norm")
                attended, k, v = self._attention(layer, given)
                x = self._added(layer, x, attended, "attn_post_norm")
                if not self._spec.layer(layer).parallel:
                    given = self._given(layer, x, "mlp_norm")
                x = self._added(layer, x, self._mlp(layer, given), "mlp_post_norm")
                new.append((k, v))
        self._write(new, x)
        self._logits(x)
        return b.graph("moac")

    # ---- the interface

    def _declare(self) -> None:
        b = self._b
        b.input("tokens", INT64, ["batch", "chunk"])
        b.input("past_lengths", INT64, ["batch"])
        b.input("counts", INT64, ["batch"])
        b.input("wanted", INT64, ["wanted"])
        for name in frequency_inputs(len(self._spec.ropes)):
            b.input(name, FLOAT, [self._spec.head_dim // 2])
        b.input("sinks", INT64, [len(self._layout.spans)])
        for cache in self._layout.caches:
            for part in ("key", "value"):
                b.input(f"past.{cache.name}.{part}", self._kind, self._cache_shape(cache))

    def _cache_shape(self, cache: CacheLayout) -> list[int | str]:
        return ["batch", cache.num_heads, f"span_{cache.span}", self._spec.head_dim]

    def _logits(self, x: str) -> None:
        b = self._b
        with b.scope("head"):
            x = self._norm(b.op("Gather", x, "wanted", axis=0), "norm", self._spec.norm)
            head = "embed.weight" if self._spec.tied_embeddings else "lm_head.weight"
            logits = self._as(FLOAT, self._weights.linear(b, x, head, None))
            logits = self._scaled(logits, self._spec.logit_scale, FLOAT)
            logits = self._capped(logits, self._spec.logit_cap)
        b.op("Identity", logits, name="logits")
        b.output("logits", FLOAT, ["wanted", self._spec.vocab_size])

    # ---- layers

    def _attention(self, layer: int, x: str) -> tuple[str, str, str]:
        """What `x` `[M, hidden]` attends to, and its keys and values `[B, K, T, D]`."""
        b, spec, name, own = self._b, self._spec, f"layers.{layer}", self._spec.layer(layer)
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        qkv = self._linear(f"{name}.qkv", x, own.qkv_bias)
        if own.qk_norm == "width":
            qkv = self._wide_qk_norm(layer, qkv)
        qkv = b.op("Reshape", qkv, self._step.by_row(heads + 2 * kv_heads, spec.head_dim))
        qkv = b.op("Transpose", qkv, perm=[0, 2, 1, 3])
        qk, v = b.ops("Split", qkv, b.ints(heads + kv_heads, kv_heads), outputs=2, axis=1)
        qk = self._qk_norm(layer, qk) if own.qk_norm == "head" else qk
        qk = qk if own.rope is None else self._rotated(qk, own.rope)
        q, k = b.ops("Split", qk, b.ints(heads, kv_heads), outputs=2, axis=1)
        q = b.op("Mul", q, b.number(own.query_scale, self._kind))
        caches = self._layout.of_layer(layer)
        parts = [
            self._attend(cache, *cut, cap=own.logit_cap)
            for cache, *cut in zip(
                caches,
                self._cut(q, caches, spec.group_size),
                self._cut(k, caches),
                self._cut(v, caches),
                strict=True,
            )
        ]
        out = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=1)
        out = b.op("Transpose", out, perm=[0, 2, 1, 3])
        out = b.op("Reshape", out, b.ints(-1, heads * spec.head_dim))
        return self._linear(f"{name}.o", out, own.o_bias), k, v

    def _cut(self, x: str, caches: Sequence[CacheLayout], share: int = 1) -> list[str]:
        """`x` `[B, heads, ...]` cut into each cache's heads, `share` of them for a KV head."""
        if len(caches) == 1:
            return [x]
        sizes = self._b.ints(*(cache.num_heads * share for cache in caches))
        return self._b.ops("Split", x, sizes, outputs=len(caches), axis=1)

    def _rotated(self, x: str, table: int) -> str:
        b, (cos, sin) = self._b, self._step.rotations[table]
        half = self._spec.head_dim // 2
        low, high = b.ops("Split", x, b.ints(half, half), outputs=2, axis=-1)
        turned = b.op("Mul", b.op("Concat", high, low, axis=-1), sin)
        return b.op("Add", b.op("Mul", x, cos), turned)

    def _qk_norm(self, layer: int, qk: str) -> str:
        b, spec = self._b, self._spec
        sizes = b.ints(spec.num_heads, spec.num_kv_heads)
        q, k = b.ops("Split", qk, sizes, outputs=2, axis=1)
        q, k = self._head_norms(layer, q, k)
        return b.op("Concat", q, k, axis=1)

    def _wide_qk_norm(self, layer: int, qkv: str) -> str:
        """Queries and keys of `[M, (H + 2K) D]` normed across all of their heads."""
        b, spec = self._b, self._spec
        widths = [n * spec.head_dim for n in (spec.num_heads, spec.num_kv_heads)]
        q, k, v = b.ops("Split", qkv, b.ints(*widths, widths[1]), outputs=3, axis=1)
        q, k = self._head_norms(layer, q, k)
        return b.op("Concat", q, k, v, axis=1)

    def _head_norms(self, layer: int, q: str, k: str) -> tuple[str, str]:
        norm = replace(self._spec.layer(layer).norm, bias=False)
        name = f"layers.{layer}"
        return self._norm(q, f"{name}.q_norm", norm), self._norm(k, f"{name}.k_norm", norm)

    def _attend(self, cache: CacheLayout, q: str, k: str, v: str, *, cap: float | None) -> str:
        """What one cache's heads attend to, `[B, n * G, T, D]`.

        Held and own keys are scored apart, so that no cache is copied. A group's queries stand
        in one matrix, so that each key is read once.
        """
        b, step, dim = self._b, self._step, self._spec.head_dim
        group, n = self._spec.group_size, cache.num_heads
        with b.scope(f"heads.{cache.first_head}"):
            q = b.op("Reshape", q, b.ints(0, n, -1, dim))
            held_k, held_v = (f"past.{cache.name}.{part}" for part in ("key", "value"))
            scores = [
                b.op("MatMul", q, b.op("Transpose", keys, perm=[0, 1, 3, 2]))
                for keys in (held_k, k)
            ]
            scored = self._capped(self._as(FLOAT, b.op("Concat", *scores, axis=-1)), cap)
            scored = b.op("Reshape", scored, step.split_group(n))
            shares = b.op("Softmax", b.op("Add", scored, step.mask(cache.span)), axis=-1)
            shares = self._as(self._kind, b.op("Reshape", shares, step.join_group(cache.span)))
            held, own = b.ops("Split", shares, step.parts(cache.span), outputs=2, axis=-1)
            out = b.op("Add", b.op("MatMul", held, held_v), b.op("MatMul", own, v))
            return b.op("Reshape", out, b.ints(0, n * group, -1, dim))

    def _mlp(self, layer: int, x: str) -> str:
        b, own, name = self._b, self._spec.layer(layer), f"layers.{layer}"
        both = self._linear(f"{name}.gate_up", x, own.mlp_bias)
        gate, up = b.ops("Split", both, outputs=2, num_outputs=2, axis=-1)
        gated = b.op("Mul", self._activated(own.activation, gate), up)
        return self._linear(f"{name}.down", gated, own.mlp_bias)

    def _activated(self, name: str, x: str) -> str:
        kind = ACTIVATIONS[name]
        found = self._b.op(str(kind.onnx), x, **kind.options)
        return self._b.op("Mul", x, found) if kind.gate else found

    def _added(self, layer: int, x: str, out: str, post_norm: str) -> str:
        """The residual `x` and what a sublayer adds to it."""
        own = self._spec.layer(layer)
        if own.post_norm:
            out = self._norm(out, f"layers.{layer}.{post_norm}", own.norm)
        return self._b.op("Add", x, self._scaled(out, self._spec.residual_scale))

    def _scaled(self, x: str, scale: float, kind: int | None = None) -> str:
        return x if scale == 1 else self._b.op("Mul", x, self._b.number(scale, kind or self._kind))

    def _capped(self, x: str, cap: float | None) -> str:
        """Float32 `x` as `cap tanh(x / cap)`."""
        if cap is None:
            return x
        b = self._b
        return b.op("Mul", b.op("Tanh", b.op("Div", x, b.number(cap))), b.number(cap))

    def _linear(self, name: str, x: str, bias: bool) -> str:
        return self._weights.linear(self._b, x, f"{name}.weight", f"{name}.bias" if bias else None)

    def _given(self, layer: int, x: str, norm: str) -> str:
        """What a sublayer is given of the residual `x`."""
        own = self._spec.layer(layer)
        return self._norm(x, f"layers.{layer}.{norm}", own.norm) if own.pre_norm else x

    def _norm(self, x: str, name: str, norm: NormSpec) -> str:
        """RMS or layer norm; these very operations are what runtimes fuse into one."""
        b, wide = self._b, self._as(FLOAT, x)
        if norm.centred:
            mean = b.op("ReduceMean", wide, b.ints(-1), keepdims=1)
            wide = b.op("Sub", wide, mean)
        mean = b.op("ReduceMean", b.op("Pow", wide, b.number(2.0)), b.ints(-1), keepdims=1)
        root = b.op("Sqrt", b.op("Add", mean, b.number(norm.eps)))
        scaled, weight = b.op("Div", wide, root), self._weights.tensor(b, f"{name}.weight")
        if not norm.plus_one and not norm.centred:
            return b.op("Mul", self._as(self._kind, scaled), weight)
        weight = self._as(FLOAT, weight)
        if norm.plus_one:
            weight = b.op("Add", weight, b.number(1.0))
        out = b.op("Mul", scaled, weight)
        if norm.bias:
            out = b.op("Add", out, self._as(FLOAT, self._weights.tensor(b, f"{name}.bias")))
        return self._as(self._kind, out)

    def _as(self, kind: int, x: str) -> str:
        """`x`, which is float32 or of the graph's dtype, as element type `kind`."""
        return x if self._kind == FLOAT else self._b.op("Cast", x, to=kind)

    # ---- the ring write

    def _write(self, new: Sequence[tuple[str, str]], hidden: str) -> None:
        """Write every cache once all layers have read theirs.

        The slots are made to depend on the size of the last layer's output, so that no order of
        execution can write before the last read: one buffer may be bound as input and output.
        """
        b, step = self._b, self._step
        with b.scope("write"):
            slots = step.slots_after(hidden)
            for layer, own in enumerate(new):
                caches = self._layout.of_layer(layer)
                kinds = b.ints(*(c.span for c in caches for _ in range(c.num_heads)))
                indices = step.indices(
                    slots, kinds, [i for c in caches for i in range(c.num_heads)]
                )
                source = step.source(kinds)
                for part, x in zip(("key", "value"), own, strict=True):
                    x = b.op("GatherND", x, source, batch_dims=2)
                    cut = (caches, self._cut(x, caches), self._cut(indices, caches))
                    for cache, tokens, index in zip(*cut, strict=True):
                        self._write_cache(cache, part, tokens, index)

    def _write_cache(self, cache: CacheLayout, part: str, tokens: str, indices: str) -> None:
        name = f"present.{cache.name}.{part}"
        self._b.op("ScatterND", f"past.{cache.name}.{part}", indices, tokens, name=name)
        self._b.output(name, self._kind, self._cache_shape(cache))
