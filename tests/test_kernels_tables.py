"""Work tables: every slot is read once, evenly, and little else is read with it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moac_kernels.tables import (
    FIELDS,
    DecodeWork,
    cache_slots,
    decode_work,
    most_items,
    most_programs,
    prefill_rows,
    prefill_tiles,
    span_table,
    token_rows,
)
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import HeadSpan, Rule

H100_PROGRAMS = 2 * 132

# (layers, query heads, KV heads, head_dim, contexts)
MODELS = {
    "smollm2": (30, 9, 3, 64, (1024, 2048, 4096, 8192)),
    "vicuna-7b": (32, 32, 32, 128, (1024, 4096, 16384)),
    "llama-3-8b": (32, 32, 8, 128, (1024, 8192, 32768)),
}


def drawn_plan(layers: int, kv_heads: int) -> Plan:
    """A plan of mean density one half whose heads differ as compiled plans do."""
    draw = random.Random(0)
    rules = tuple(
        tuple(
            Rule(draw.choice((-512, -256, 0, 256)), draw.choice((0.125, 0.25, 0.375, 0.625, 1.0)))
            for _ in range(kv_heads)
        )
        for _ in range(layers)
    )
    return Plan(rules, sink=64, block=64, min_span=128, windows=(None,) * layers)


SMOLLM2 = Path(__file__).parent / "golden" / "smollm2_plan.json"
"""The rules that `moac compile` of SmolLM2-135M-Instruct at half the KV memory wrote."""


def plan_of(model: str) -> Plan:
    """SmolLM2's own; for the others one of their shape."""
    if model == "smollm2":
        return Plan.from_json(json.loads(SMOLLM2.read_text(encoding="utf-8")))
    layers, _, kv_heads, _, _ = MODELS[model]
    return drawn_plan(layers, kv_heads)


def held(heads: list[HeadSpan], positions: list[int]) -> Tensor:
    return torch.tensor([[min(p + 1, head.size) for head in heads] for p in positions])


def decode_bytes(work: DecodeWork, head_dim: int, group: int) -> int:
    """What the decode launch reads in 16 bits: keys, values, queries and tables."""
    slots = int((work.items[:, 3] - work.items[:, 2]).sum())
    each = group * head_dim * 2 + 16 + 4 * FIELDS + 4  # query, item, span, position
    return slots * 2 * head_dim * 2 + len(work.items) * each + 4 * len(work.programs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch", [1, 5])
def test_decode_reads_what_the_plan_holds_and_shares_it_evenly(model: str, batch: int) -> None:
    _, heads, kv_heads, head_dim, contexts = MODELS[model]
    plan = plan_of(model)
    for context in contexts:
        assert 0.38 < plan.density(context) < 0.6
        positions = [context - 1 - context // 8 * row for row in range(batch)]
        for spans in plan.spans(context):
            table = span_table(spans, batch)
            programs = min(H100_PROGRAMS, most_programs(table))
            work = decode_work(table, positions, programs=programs)
            read = decode_bytes(work, head_dim, heads // kv_heads)
            plain = int(held(spans, positions).sum()) * 2 * head_dim * 2
            assert plain < read <= 1.02 * plain
            tokens = work.tokens()
            busy = tokens[tokens > 0]
            assert busy.max() <= 1.1 * busy.double().mean()


def test_a_launch_has_no_more_programs_than_full_caches_keep_busy() -> None:
    heads = [HeadSpan(700, 64), HeadSpan(300, 64)]
    table = span_table(heads, 2)
    most = most_programs(table)
    assert most == 2000 // 128
    full = decode_work(table, [5000, 5000], programs=1000)
    assert int((full.tokens() > 0).sum()) == most
    assert torch.equal(decode_work(table, [5000, 5000], programs=most).items, full.items)
    assert most_programs(span_table([HeadSpan(9, 8)], 1)) == 1


def cover(work: DecodeWork, spans: Tensor, positions: list[int]) -> Tensor:
    """How many slots of each row and KV head the items read, each one once."""
    batch, kv_heads = spans.shape[:2]
    read = torch.zeros(batch, kv_heads, dtype=torch.int64)
    for index in range(batch * kv_heads):
        row, head = index // kv_heads, index % kv_heads
        at = 0
        for item in range(int(work.parts[index]), int(work.parts[index + 1])):
            found = work.items[item].tolist()
            assert found[:3] == [row, head, at]
            assert found[3] > at
            at = found[3]
        read[row, head] = at
    return read


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_slot_is_read_by_one_program(data: st.DataObject) -> None:
    heads = [
        HeadSpan(data.draw(st.integers(9, 3000)), data.draw(st.sampled_from([0, 8])))
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    positions = data.draw(st.lists(st.integers(-1, 4000), min_size=1, max_size=5))
    programs = data.draw(st.integers(1, 300))
    spans = span_table(heads, len(positions))
    work = decode_work(spans, positions, programs=programs)
    assert torch.equal(cover(work, spans, positions), held(heads, positions))
    assert work.programs.shape == (programs + 1,)
    assert work.programs[0] == 0
    assert work.programs[-1] == len(work.items)
    assert bool((work.programs.diff() >= 0).all())
    assert len(work.items) <= most_items(len(positions), len(heads), programs)
    assert work.parts[0] == 0
    assert work.parts[-1] == len(work.items)


def test_rows_lie_one_after_another_in_each_head() -> None:
    heads = [HeadSpan(10, 2), HeadSpan(7, 0, 7)]
    table = span_table(heads, 3, shifts=[[0, 5, 0], [0] * 3], gaps=[[0, 2, 0], [0] * 3])
    assert cache_slots(heads, 3) == 51
    assert table[:, :, 0].tolist() == [[0, 30], [10, 37], [20, 44]]
    assert table[1, 0, 1:6].tolist() == [10, 2, 2**31 - 1, 5, 2]
    assert table[0, 1, 1:6].tolist() == [7, 0, 7, 0, 0]


def test_lost_tokens_are_not_read() -> None:
    table = span_table([HeadSpan(100, 4)], 2, shifts=[[0, 30]], gaps=[[0, 4]])
    work = decode_work(table, [49, 49], programs=4)
    assert cover(work, table, [49, 49]).flatten().tolist() == [50, 20]


def test_prefill_tiles_cover_all_queries_heaviest_first() -> None:
    heads = [HeadSpan(1000, 0), HeadSpan(40, 8)]
    rows = prefill_rows([0, 100, 3], [70, 0, 33])
    assert rows[:, 0].tolist() == [0, 70, 70]
    assert token_rows(rows).tolist() == [0] * 70 + [2] * 33
    tiles = prefill_tiles(span_table(heads, 3), rows, block_m=32)
    found = sorted(map(tuple, tiles[:, :3].tolist()))
    assert found == sorted(
        [(0, head, first) for head in (0, 1) for first in (0, 32, 64)]
        + [(2, head, first) for head in (0, 1) for first in (0, 32)]
    )
    assert tiles[0, :3].tolist() == [0, 0, 64]
    assert tiles[-1, :3].tolist() == [0, 1, 0]
