"""Attention alone: decode against the copy bandwidth, prefill against torch's own kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moac.bench.plans import random_plan
from moac.bench.shapes import shape_spec
from moac.packaging.kernels import require_kernels
from moac_kernels.shape import KernelShape
from moac_runtime.backends.cuda.launch import Kernels
from moac_runtime.package.span import HeadSpan
from on_gpu.setting import Setting, attempted, seconds
from on_gpu.workshop import Workshop

DTYPES = {"vicuna-7b": "float16"}  # all else is bfloat16
_COLD = 1 << 29  # bytes of caches that calls take turns with, far more than a device's L2
_DENSITY = 0.5


def shape_of(setting: Setting, name: str) -> KernelShape:
    """The kernels' side of a model's shape."""
    dtype = "float32" if setting.interpret else DTYPES.get(name, "bfloat16")
    return require_kernels(shape_spec(name), None, dtype)


@dataclass(frozen=True, slots=True)
class _Bench:
    """Kernels of one shape on the device."""

    setting: Setting
    kernels: Kernels
    tables: Any
    shape: KernelShape

    def random(self, *size: int) -> Tensor:
        """Random numbers in the model's dtype."""
        dtype: torch.dtype = getattr(torch, self.shape.dtype)
        return torch.randn(size, dtype=dtype, device=self.setting.device)

    def table(self, table: Tensor) -> Tensor:
        """A table on the device."""
        return table.to(self.setting.device)


def _bench(setting: Setting, workshop: Workshop, name: str) -> _Bench:
    shape = shape_of(setting, name)
    return _Bench(setting, workshop.load(shape), workshop.tables(shape), shape)


def decode_rows(setting: Setting, workshop: Workshop, copy_gbs: float) -> Iterator[dict[str, Any]]:
    """Decode of one layer: dense, spans that differ, and a uniform window of as many tokens."""
    for name, batch, tokens in setting.attention:
        for kind, heads in _span_kinds(name, tokens).items():
            told = (name, heads, batch, tokens, copy_gbs)
            row = attempted(
                f"decode {name} b{batch} {tokens} {kind}",
                partial(_decode_row, setting, workshop, *told),
            )
            yield {**row, "shape": name, "batch": batch, "tokens": tokens, "kind": kind}


def _decode_row(
    setting: Setting,
    workshop: Workshop,
    name: str,
    heads: Sequence[HeadSpan],
    batch: int,
    tokens: int,
    copy_gbs: float,
) -> dict[str, Any]:
    bench = _bench(setting, workshop, name)
    held = batch * sum(head.size for head in heads)
    bytes_read = held * 2 * bench.shape.head_dim * bench.shape.itemsize
    taken = _decode_seconds(bench, heads, batch, tokens)
    return {
        "bytes": bytes_read,
        "us": taken * 1e6,
        "floor_us": bytes_read / copy_gbs / 1e3,
        "of_bandwidth": bytes_read / taken / 1e9 / copy_gbs,
    }


def _span_kinds(name: str, tokens: int) -> dict[str, Sequence[HeadSpan]]:
    spec = shape_spec(name)
    plan = random_plan(spec, density=_DENSITY, capacity=tokens, seed=0)
    # the layer whose spans differ most
    mixed = max(plan.spans(tokens), key=lambda heads: len({head.size for head in heads}))
    mean = sum(head.size for head in mixed) // len(mixed)
    return {
        "dense": [HeadSpan(tokens, 0)] * spec.num_kv_heads,
        "spans": mixed,
        "uniform": [HeadSpan(mean, min(64, mean - 1))] * spec.num_kv_heads,
    }


def _decode_seconds(bench: _Bench, heads: Sequence[HeadSpan], batch: int, tokens: int) -> float:
    shape, tables, kernels = bench.shape, bench.tables, bench.kernels
    slots = tables.cache_slots(heads, batch)
    each = slots * 2 * shape.head_dim * shape.itemsize
    turns = 1 if bench.setting.interpret else max(2, _COLD // each)
    caches = [
        (bench.random(slots, shape.head_dim), bench.random(slots, shape.head_dim))
        for _ in range(turns)
    ]
    spans = tables.span_table(heads, batch)
    work = tables.decode_work(spans, [tokens - 1] * batch, programs=kernels.programs)
    room = tables.most_items(batch, shape.num_kv_heads, kernels.programs)
    device = bench.setting.device
    found = {
        "partial": torch.empty(room, shape.group, shape.head_dim, device=device),
        "weight": torch.empty(room, shape.group, device=device),
    }
    steering = {
        "positions": bench.table(torch.full((batch,), tokens - 1, dtype=torch.int32)),
        "spans": bench.table(spans),
        "items": bench.table(work.items),
        "programs": bench.table(work.programs),
        "parts": bench.table(work.parts),
        "sink_logits": bench.random(shape.num_heads),
    }
    qkv = bench.random(batch, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    out = bench.random(batch, shape.num_heads, shape.head_dim)
    grid = (kernels.programs,)

    def calls() -> None:
        for keys, values in caches:
            told = {"qkv": qkv, "keys": keys, "values": values, **steering, **found}
            kernels.launch("decode", grid, **told)
            kernels.launch("combine", (batch * shape.num_heads,), **told, out=out)

    return seconds(bench.setting, calls, calls=turns)


def prefill_rows(setting: Setting, workshop: Workshop) -> Iterator[dict[str, Any]]:
    """Prefill of one layer, one row: dense and at half the density, beside torch's SDPA."""
    for name, tokens in setting.prefill:
        kinds = _span_kinds(name, tokens)
        for kind in ("dense", "spans"):
            row = attempted(
                f"prefill {name} {tokens} {kind}",
                partial(_prefill_row, setting, workshop, name, kinds[kind], tokens),
            )
            yield {**row, "kind": kind, "tokens": tokens}


def _prefill_row(
    setting: Setting, workshop: Workshop, name: str, heads: Sequence[HeadSpan], tokens: int
) -> dict[str, Any]:
    bench = _bench(setting, workshop, name)
    sdpa = _sdpa_seconds(bench, tokens)
    pair_flops = 4 * bench.shape.head_dim * bench.shape.group
    dense_flops = pair_flops * bench.shape.num_kv_heads * tokens * (tokens + 1) // 2
    taken, visited = _prefill_seconds(bench, heads, tokens)
    return {
        "density": sum(head.size for head in heads) / len(heads) / tokens,
        "ms": taken * 1e3,
        "sdpa_ms": sdpa * 1e3,
        "times_sdpa": sdpa / taken,
        "flops_of_sdpa": (visited * pair_flops / taken) / (dense_flops / sdpa),
    }


def _prefill_seconds(bench: _Bench, heads: Sequence[HeadSpan], tokens: int) -> tuple[float, int]:
    """Seconds, and the pairs of query and key in the tiles that are visited, over all heads."""
    shape, tables, kernels = bench.shape, bench.tables, bench.kernels
    rows, spans = tables.prefill_rows([0], [tokens]), tables.span_table(heads, 1)
    block_m = kernels.constant("prefill", "BLOCK_M")
    tiles = tables.prefill_tiles(spans, rows, block_m=block_m)
    slots = tables.cache_slots(heads, 1)
    told = {
        "qkv": bench.random(tokens, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim),
        "keys": bench.random(slots, shape.head_dim),
        "values": bench.random(slots, shape.head_dim),
        "spans": bench.table(spans),
        "rows": bench.table(rows),
        "tiles": bench.table(tiles),
        "sink_logits": bench.random(shape.num_heads),
        "out": bench.random(tokens, shape.num_heads, shape.head_dim),
    }
    grid = (len(tiles) * shape.group,)

    def call() -> None:
        kernels.launch("prefill", grid, **told)

    visited = sum(_visited(head, tokens, block_m) for head in heads)
    return seconds(bench.setting, call), visited


def _visited(head: HeadSpan, tokens: int, block_m: int) -> int:
    """Pairs in the tiles of queries, each with all the keys that any of its queries sees."""
    pairs = 0
    for first in range(0, tokens, block_m):
        stop = min(first + block_m, tokens)
        low = first - (head.size - head.sink) + 1
        keys = stop - low + head.sink if low > head.sink else stop
        # on the diagonal a tile counts half, as it does for dense causal attention
        pairs += (stop - first) * keys - (stop - first) * (stop - first - 1) // 2
    return pairs


def _sdpa_seconds(bench: _Bench, tokens: int) -> float:
    shape = bench.shape
    q = bench.random(1, shape.num_heads, tokens, shape.head_dim)
    k = bench.random(1, shape.num_kv_heads, tokens, shape.head_dim)
    v = torch.randn_like(k)

    def call() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return seconds(bench.setting, call)
