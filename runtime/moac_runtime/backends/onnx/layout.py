"""`onnx.json`: what a client of the ONNX graph must know, whatever its language.

Caches are cut where rules differ, so that one graph serves every capacity: heads of a layer with
equal rules have equal spans at all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from moac_runtime.errors import UsageError
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import HeadSpan, Rule, head_span

ONNX_MODEL = "model.onnx"
ONNX_LAYOUT = "onnx.json"
OPSET = 21


def frequency_inputs(tables: int) -> list[str]:
    """The graph's inputs for the frequencies of each of a model's rotary tables."""
    return ["inv_freq", *(f"inv_freq.{table}" for table in range(1, tables))]


@dataclass(frozen=True, slots=True)
class SpanKind:
    """Caches that have the same span at every capacity. `window`: the layer's own, in tokens."""

    alpha: int
    beta: float
    window: int | None


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """One pair of inputs, `past.{name}.key` and `past.{name}.value`, and of outputs `present...`.

    `first_head`, `num_heads`: its KV heads in packed order; `span`: index into the spans.
    """

    name: str
    layer: int
    first_head: int
    num_heads: int
    span: int


@dataclass(frozen=True, slots=True)
class OnnxLayout:
    """The graph's interface. `dtype`: of the caches; `weights`: how the linear weights are stored.

    `sink`, `block`, `min_span` and `capacity` (most tokens a session may hold) are in tokens.
    """

    dtype: str
    weights: str
    sink: int
    block: int
    min_span: int
    capacity: int
    head_dim: int
    vocab_size: int
    spans: tuple[SpanKind, ...]
    caches: tuple[CacheLayout, ...]
    opset: int = OPSET
    model: str = ONNX_MODEL

    def of_layer(self, layer: int) -> list[CacheLayout]:
        """The caches of one layer, in packed order of their heads."""
        return [cache for cache in self.caches if cache.layer == layer]

    def resolve(self, capacity: int) -> list[HeadSpan]:
        """Every kind's span in rows of `capacity` tokens, under the plan it was made for."""
        return [
            head_span(
                Rule(kind.alpha, kind.beta),
                capacity,
                sink=self.sink,
                block=self.block,
                min_span=self.min_span,
                window=kind.window,
            )
            for kind in self.spans
        ]

    def under(self, heads: Sequence[Sequence[HeadSpan]]) -> list[HeadSpan]:
        """Every kind's span where the heads `[layers][kv_heads]`, in packed order, have these.

        Raises UsageError where heads of a kind, which share a cache or the graph's input for their
        sinks, have different ones.
        """
        found: dict[int, HeadSpan] = {}
        for cache in self.caches:
            for head in heads[cache.layer][cache.first_head :][: cache.num_heads]:
                if found.setdefault(cache.span, head) != head:
                    raise UsageError(
                        "the package's ONNX graph does not serve this plan: heads that share a "
                        "cache there have different spans; run it with --backend torch"
                    )
        return [found[kind] for kind in range(len(self.spans))]

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values, inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OnnxLayout:
        """Other keys are ignored. Raises KeyError and TypeError."""
        values = {name: data[name] for name in cls.__slots__}
        values["spans"] = tuple(SpanKind(**kind) for kind in values["spans"])
        values["caches"] = tuple(CacheLayout(**cache) for cache in values["caches"])
        return cls(**values)


def cache_layouts(
    plan: Plan, head_order: Sequence[Sequence[int]]
) -> tuple[tuple[SpanKind, ...], tuple[CacheLayout, ...]]:
    """The kinds of spans in `plan`, and one cache for each run of adjacent heads of one kind."""
    kinds: dict[SpanKind, int] = {}
    caches = []
    for layer, order in enumerate(head_order):
        rules = [plan.rules[layer][head] for head in order]
        first = 0
        for rule, run in groupby(rules):
            count = len(list(run))
            kind = kinds.setdefault(
                SpanKind(rule.alpha, rule.beta, plan.windows[layer]), len(kinds)
            )
            caches.append(CacheLayout(f"{layer}.{first}", layer, first, count, kind))
            first += count
    return tuple(kinds), tuple(caches)
