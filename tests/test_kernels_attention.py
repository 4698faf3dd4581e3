"""Decode and prefill kernels in the interpreter, against the oracle over the span contract.

A case is played as a runtime would: tokens come in chunks and then one by one, keys and values go
through `kv_write` and `rope_decode` into the flat `[sinks | ring]` buffers, and every output row
is compared with dense masked attention over all tokens ever fed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import Interpreter, shape
from torch import Tensor

from moac_kernels.reference import layer_mask, masked_attention
from moac_kernels.shape import KernelShape, padded
from moac_kernels.tables import (
    cache_slots,
    decode_work,
    most_items,
    prefill_rows,
    prefill_tiles,
    span_table,
    token_rows,
)
from moac_runtime.package.span import HeadSpan, visible

# A sum of n products errs by about sqrt(n) roundings; outputs are averages of unit normals.
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    made = Interpreter()
    yield made
    made.close()


@dataclass
class Layer:
    """One layer's cache and history, fed with random queries, keys and values."""

    run: Interpreter
    kernels: KernelShape
    heads: Sequence[HeadSpan]
    batch: int
    block_n: int = 16
    block_m: int = 16
    dtype: torch.dtype = torch.float32
    programs: int = 5
    shift: int = 0
    gap: int = 0
    history: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        slots = cache_slots(self.heads, self.batch)
        # NaN: a slot that is read before it is written must show
        self.keys = torch.full((slots, self.kernels.head_dim), float("nan"), dtype=self.dtype)
        self.values = self.keys.clone()
        self.spans = span_table(self.heads, self.batch)
        # of a few: some weigh more than all keys together
        self.sinks = 3 * torch.randn(self.kernels.num_heads).to(self.dtype)
        self.history = [[] for _ in range(self.batch)]

    def lengths(self) -> list[int]:
        """Tokens fed to each row, those lost to growth included."""
        return [sum(len(part) for part in row) + self.shift for row in self.history]

    def lose(self, count: int) -> None:
        """As if each row had been fed so many more tokens, which a growing cache then lost."""
        (self.gap,) = set(self.lengths())
        self.shift = count
        each = [[value] * self.batch for value in (self.shift, self.gap)]
        shifts, gaps = ([one] * len(self.heads) for one in each)
        self.spans = span_table(self.heads, self.batch, shifts=shifts, gaps=gaps)

    def tokens(self, counts: Sequence[int]) -> Tensor:
        """New tokens `[M, H + 2 K, D]`, kept in the history of their rows."""
        heads = self.kernels.num_heads + 2 * self.kernels.num_kv_heads
        qkv = torch.randn(sum(counts), heads, self.kernels.head_dim).to(self.dtype)
        for row, part in enumerate(qkv.split(list(counts))):
            self.history[row].append(part.clone())
        return qkv

    def prefill(self, counts: Sequence[int]) -> None:
        """Feed each row some tokens at once, and check what they attend to."""
        starts = self.lengths()
        qkv = self.tokens(counts)
        rows = prefill_rows(starts, counts)
        tiles = prefill_tiles(self.spans, rows, block_m=self.block_m)
        group = self.kernels.group
        out = torch.full((len(qkv), self.kernels.num_heads, self.kernels.head_dim), 7.0).to(qkv)
        cache = [self.keys, self.values, self.spans]
        self.run(
            self.kernels, "prefill", "prefill", [len(tiles) * group],
            [qkv, *cache, rows, tiles, self.sinks, out],
            PAST=any(starts), BLOCK_M=self.block_m, BLOCK_N=self.block_n,
        )  # fmt: skip
        self.run(
            self.kernels, "rope", "kv_write", [len(qkv)], [qkv, *cache, rows, token_rows(rows)],
            KV_TILE=padded(self.kernels.num_kv_heads),
        )  # fmt: skip
        self.check(out.split(list(counts)))

    def decode(self, fed: Sequence[bool], ahead: int = 0) -> None:
        """Feed one token to some rows, by a work table made for `ahead` more."""
        qkv = self.tokens([1] * self.batch)
        for row, takes_part in enumerate(fed):
            if not takes_part:
                self.history[row].pop()
        now = [n - 1 if on else -1 for n, on in zip(self.lengths(), fed, strict=True)]
        positions = torch.tensor(now, dtype=torch.int32)
        plain = torch.ones(self.batch, self.kernels.head_dim // 2)
        norm = torch.ones(self.kernels.head_dim, dtype=self.dtype)
        cache = [self.keys, self.values, self.spans]
        heads = self.kernels.num_heads + 2 * self.kernels.num_kv_heads
        self.run(
            self.kernels, "rope", "rope_decode", [self.batch, -(-heads // 8)],
            [qkv, plain, plain * 0, norm, norm, *cache, positions], HEAD_TILE=8,
        )  # fmt: skip
        horizon = [p + ahead if p >= 0 else -1 for p in now]
        work = decode_work(self.spans, horizon, programs=self.programs)
        room = most_items(self.batch, len(self.heads), self.programs)
        assert len(work.items) <= room
        group, dim = self.kernels.group, self.kernels.head_dim
        partial = torch.full((room, group, dim), float("nan"))
        weight = torch.full((room, group), float("nan"))
        out = torch.full((self.batch, self.kernels.num_heads, dim), 7.0).to(qkv)
        self.run(
            self.kernels, "decode", "decode", [self.programs],
            [qkv, *cache, work.items, work.programs, positions, partial, weight],
            BLOCK_N=self.block_n,
        )  # fmt: skip
        self.run(
            self.kernels, "decode", "combine", [self.batch * self.kernels.num_heads],
            [partial, weight, work.parts, self.sinks, out],
        )  # fmt: skip
        self.check([part if on else part[:0] for part, on in zip(out.split(1), fed, strict=True)])
        assert not out[[not on for on in fed]].any()

    def check(self, found: Sequence[Tensor]) -> None:
        """The newest tokens' outputs against the oracle over each row's whole history."""
        heads = self.kernels.num_heads
        for row, part in enumerate(found):
            if not len(part):
                continue
            every = torch.cat(self.history[row]).transpose(0, 1)[None]
            q, k, v = every.split([heads, len(self.heads), len(self.heads)], dim=1)
            place = torch.arange(every.shape[2])
            place += self.shift * (place >= self.gap)
            mask = layer_mask(
                lambda query, key, head: visible(query, key, self.heads[head]),
                place[-len(part) :], place, len(self.heads),
            )  # fmt: skip
            scale = self.kernels.query_scale or self.kernels.head_dim**-0.5
            wanted = masked_attention(
                q[:, :, -len(part) :], k, v, mask, scale, self.kernels.score_cap,
                sinks=self.sinks if self.kernels.sink_logits else None,
            )  # fmt: skip
            difference = (part.transpose(0, 1).float() - wanted[0]).abs().max()
            assert difference < LIMITS[self.dtype], f"row {row}: {difference}"


SPANS = (
    HeadSpan(size=64, sink=0),  # dense up to 64 tokens
    HeadSpan(size=21, sink=5),
    HeadSpan(size=9, sink=8),  # sinks, and one token more
    HeadSpan(size=37, sink=16),
)


def test_decode_fills_the_ring_and_wraps(interpreter: Interpreter) -> None:
    torch.manual_seed(0)
    layer = Layer(interpreter, shape(4, 2), SPANS, 2)
    layer.prefill([1, 7])
    for _ in range(6):
        layer.decode([True, True], ahead=3)
    layer.prefill([33, 14])
    for step in range(5):
        layer.decode([step != 2, True], ahead=3)


def test_prefill_over_a_cache_equals_the_oracle(interpreter: Interpreter) -> None:
    torch.manual_seed(1)
    layer = Layer(interpreter, shape(4, 1), SPANS, 3)
    layer.prefill([1, 47, 0])  # a row of one token, one of none, none a multiple of a tile
    layer.prefill([17, 3, 40])
    layer.prefill([30, 10, 1])
    layer.decode([True, True, True])


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
def test_group_sizes(interpreter: Interpreter, group: int) -> None:
    torch.manual_seed(2)
    layer = Layer(interpreter, shape(2, group), SPANS[:2], 1)
    layer.prefill([23])
    layer.decode([True])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["float16"])  # the interpreter has no bfloat16
def test_head_dims_and_dtypes(interpreter: Interpreter, head_dim: int, dtype: str) -> None:
    torch.manual_seed(3)
    kernels = shape(2, 2, head_dim, dtype=dtype)
    layer = Layer(interpreter, kernels, SPANS[1:3], 1, dtype=getattr(torch, dtype))
    layer.prefill([19])
    layer.prefill([9])
    layer.decode([True])


@pytest.mark.parametrize(
    "heads",
    [
        (HeadSpan(size=24, sink=0, window=24), HeadSpan(size=16, sink=4, window=24)),
        (HeadSpan(size=20, sink=16, window=20), HeadSpan(size=20, sink=3, window=40)),
    ],
)
def test_own_windows_of_the_checkpoint(
    interpreter: Interpreter, heads: tuple[HeadSpan, ...]
) -> None:
    torch.manual_seed(4)
    layer = Layer(interpreter, shape(2, 2, windowed=True), heads, 2)
    layer.prefill([11, 30])
    layer.decode([True, True])
    layer.prefill([20, 20])
    layer.prefill([20, 1])
    for _ in range(3):
        layer.decode([True, True])


OPTIONS = {
    "scale": {"query_scale": 0.7},
    "cap": {"query_scale": 0.9, "score_cap": 2.0},  # of scores that it bends to the end
    "sink_logits": {"sink_logits": True},
    "all": {"query_scale": 0.5, "score_cap": 3.0, "sink_logits": True, "windowed": True},
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_attention(interpreter: Interpreter, name: str, dtype: str) -> None:
    torch.manual_seed(6)
    kernels = shape(2, 2, 16, dtype=dtype, **OPTIONS[name])
    window = 30 if kernels.windowed else None
    heads = (HeadSpan(size=21, sink=5, window=window), HeadSpan(window or 64, 0, window))
    layer = Layer(interpreter, kernels, heads, 2, dtype=getattr(torch, dtype))
    layer.prefill([19, 1])  # a row of one token, whose softmax has that key and the logit alone
    layer.prefill([15, 20])
    for fed in ([True, True], [True, False], [True, True]):
        layer.decode(fed)


def test_a_cap_far_below_the_scores_overflows_nothing(interpreter: Interpreter) -> None:
    torch.manual_seed(7)
    layer = Layer(interpreter, shape(1, 2, 16, query_scale=1e4, score_cap=0.5), SPANS[:1], 1)
    layer.prefill([18])
    layer.decode([True])


@pytest.mark.parametrize("windowed", [False, True])
def test_tokens_that_growth_lost(interpreter: Interpreter, windowed: bool) -> None:
    torch.manual_seed(5)
    heads = (
        # dense, with the tokens before the gap in its ring; sinks up to the gap
        HeadSpan(size=30 if windowed else 80, sink=0, window=30 if windowed else None),
        HeadSpan(size=20, sink=6, window=33 if windowed else None),
    )
    layer = Layer(interpreter, shape(2, 2, windowed=windowed), heads, 2)
    layer.prefill([6, 6])
    layer.lose(11)
    layer.prefill([9, 1])
    for _ in range(3):
        layer.decode([True, True])
    layer.prefill([18, 13])
    layer.decode([True, True])


@st.composite
def spans(draw: st.DrawFn, count: int) -> tuple[HeadSpan, ...]:
    """Spans of one layer: dense, or sinks and a ring, or under an own window."""
    sink = draw(st.integers(0, 20))
    window = draw(st.none() | st.integers(sink + 1, 60))
    heads = []
    for _ in range(count):
        most = 80 if window is None else window
        size = draw(st.integers(sink + 1, most))
        heads.append(HeadSpan(size, 0 if size == most else sink, window))
    return tuple(heads)


def play(interpreter: Interpreter, data: st.DataObject, *, longest: int) -> None:
    """Draw a layer and feed it some chunks and single tokens, at most 80 a row."""
    kv_heads = data.draw(st.integers(1, 3), "KV heads")
    heads = data.draw(spans(kv_heads), "spans")
    batch = data.draw(st.integers(1, 3), "batch")
    kernels = shape(
        kv_heads, data.draw(st.sampled_from([1, 2, 3]), "group"), 16,
        windowed=heads[0].window is not None,
        score_cap=data.draw(st.sampled_from([None, 1.5]), "cap"),
        sink_logits=data.draw(st.booleans(), "sink logits"),
    )  # fmt: skip
    layer = Layer(
        interpreter, kernels, heads, batch,
        block_n=data.draw(st.sampled_from([16, 32]), "BLOCK_N"),
        block_m=data.draw(st.sampled_from([16, 32]), "BLOCK_M"),
        programs=data.draw(st.integers(1, 9), "programs"),
    )  # fmt: skip
    torch.manual_seed(0)
    for _ in range(data.draw(st.integers(1, 3), "steps")):
        room = [max(min(longest, 78 - length), 0) for length in layer.lengths()]
        counts = [data.draw(st.integers(0, most), "tokens") for most in room]
        if any(counts):
            layer.prefill(counts)
        if max(layer.lengths()) < 79:
            layer.decode([True] * batch, ahead=data.draw(st.integers(0, 20), "ahead"))


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_layer(interpreter: Interpreter, data: st.DataObject) -> None:
    play(interpreter, data, longest=30)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_layer_at_length(interpreter: Interpreter, data: st.DataObject) -> None:
    play(interpreter, data, longest=60)
