"""The tables that steer the kernels: where each head's cache lies, and who works on what.

Plain torch on the host, no Triton; `kernels/tables.py` of a package is this file. LAUNCH.md says
which kernel takes which table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FIELDS = 8
"""int32 values a row and KV head has in the span table: first slot, size, sink, window, shift,
gap, and two that are unused."""

NO_WINDOW = 2**31 - 1
LEAST_TOKENS = 128
"""Tokens a decode program should at least get: below, its fixed cost outweighs the sharing."""

_SNAP = 32  # a share may move by 1/32 of itself to end where a head ends


class Span(Protocol):
    """What one KV head holds: `size` slots, the first `sink` pinned; its own `window` or None."""

    @property
    def size(self) -> int: ...
    @property
    def sink(self) -> int: ...
    @property
    def window(self) -> int | None: ...


def cache_slots(heads: Sequence[Span], batch: int) -> int:
    """Slots of one layer's key buffer `[slots, D]` (and of its value buffer)."""
    return batch * sum(head.size for head in heads)


def span_table(
    heads: Sequence[Span],
    batch: int,
    *,
    shifts: Sequence[Sequence[int]] | None = None,
    gaps: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """One layer's spans, int32 `[B, K, 8]`, for KV heads in packed order.

    Head after head lies in the buffer as `[B, size, D]`. `shifts[head][row]`, `gaps[head][row]`:
    tokens lost when a cache grew, and the first position of them (none where left out).
    """
    table = torch.zeros(batch, len(heads), FIELDS, dtype=torch.int32)
    base = 0
    for index, head in enumerate(heads):
        table[:, index, 0] = base + torch.arange(batch) * head.size
        table[:, index, 1] = head.size
        table[:, index, 2] = head.sink
        table[:, index, 3] = NO_WINDOW if head.window is None else head.window
        if shifts is not None and gaps is not None:
            table[:, index, 4] = torch.tensor(shifts[index])
            table[:, index, 5] = torch.tensor(gaps[index])
        base += batch * head.size
    return table


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Who attends to what in a decode step; all int32.

    `items` `[n, 4]`: row, KV head, first slot, slot to stop before; `programs` `[P + 1]`: program
    `p` has items `programs[p]` up to `programs[p + 1]`; `parts` `[B * K + 1]`: row and KV head
    `i = row * K + head` has items `parts[i]` up to `parts[i + 1]`.
    """

    items: Tensor
    programs: Tensor
    parts: Tensor

    def tokens(self) -> Tensor:
        """Slots each program reads, `[P]`, int64."""
        lengths = (self.items[:, 3] - self.items[:, 2]).long()
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return ends[self.programs.long()].diff()


def most_items(batch: int, num_kv_heads: int, programs: int) -> int:
    """Items a table can have: what `items`, and the partial results, need room for."""
    return programs + batch * num_kv_heads


def most_programs(spans: Tensor) -> int:
    """Programs that full caches keep busy: what a launch needs at most, whatever the device."""
    return max(int(spans[..., 1].sum()) // LEAST_TOKENS, 1)


def decode_work(spans: Tensor, positions: Sequence[int], *, programs: int) -> DecodeWork:
    """Share the slots of all rows and KV heads out evenly over at most `programs` programs.

    `spans`: a `span_table`. `positions[row]`: of the new token, -1 for a row that takes no part.
    The table serves every smaller position too (runs end where the row ends), so build it for
    some steps ahead and again when they are used up.
    """
    after = torch.tensor(positions)[:, None] + 1
    table = spans.long()
    held = torch.minimum(after - table[..., 4], table[..., 1]).clamp(min=0)
    held = torch.where(after > 0, held, 0).flatten()
    ends = held.cumsum(0)
    starts = ends - held
    bounds = _bounds(ends, programs)
    cuts = torch.cat([bounds, starts[held > 0]]).unique()
    first, stop = cuts[:-1], cuts[1:]
    owner = torch.searchsorted(ends, first, right=True)
    num_kv_heads = spans.shape[1]
    items = torch.stack(
        [owner // num_kv_heads, owner % num_kv_heads, first - starts[owner], stop - starts[owner]],
        dim=1,
    )
    shares = torch.searchsorted(first, bounds)
    idle = shares.new_full((programs + 1 - len(shares),), len(items))
    parts = torch.searchsorted(first, torch.cat([starts, ends[-1:]]))
    return DecodeWork(items.int(), torch.cat([shares, idle]).int(), parts.int())


def _bounds(ends: Tensor, programs: int) -> Tensor:
    """Where each program's share of the slots, laid end to end, begins; and where the last ends.

    A bound close to the end of a head moves there: one item less, for hardly any imbalance.
    """
    total = int(ends[-1])
    count = max(min(programs, total // LEAST_TOKENS), 1)
    bounds = torch.arange(count + 1) * total // count
    near = torch.searchsorted(ends, bounds).clamp(max=len(ends) - 1)
    choices = torch.stack([ends[near], ends[(near - 1).clamp(min=0)]])
    best = choices.gather(0, (choices - bounds).abs().argmin(0, keepdim=True))[0]
    snapped = torch.where((best - bounds).abs() * _SNAP * count <= total, best, bounds)
    snapped[0], snapped[-1] = 0, total
    return snapped


def prefill_rows(starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Rows of a prefill step, int32 `[B, 4]`: its first new token among all, how many there are,
    the first one's position, and an unused field. New tokens stand row after row."""
    count = torch.tensor(counts)
    rows = torch.stack([count.cumsum(0) - count, count, torch.tensor(starts), 0 * count], dim=1)
    return rows.int()


def token_rows(rows: Tensor) -> Tensor:
    """The row of each new token, int32 `[M]`."""
    return torch.repeat_interleave(torch.arange(len(rows)), rows[:, 1].long()).int()


def prefill_tiles(spans: Tensor, rows: Tensor, *, block_m: int) -> Tensor:
    """Tiles of queries, int32 `[n, 4]`: row, KV head, first query of the row, unused.

    Those that see most keys come first, so that the last programs to run are short ones.
    """
    tiles = (rows[:, 1].long() + block_m - 1) // block_m
    row = torch.repeat_interleave(torch.arange(len(rows)), tiles)
    first = (torch.arange(len(row)) - (tiles.cumsum(0) - tiles)[row]) * block_m
    table, count = spans.long()[row], rows[row, 1].long()
    size, sink, shift = table[..., 1], table[..., 2], table[..., 4]
    start = rows[row, 2].long()[:, None] - shift + first[:, None]
    stop = start + torch.minimum(first + block_m, count)[:, None] - first[:, None]
    low = start - (size - sink) + 1
    keys = torch.where(low > sink, stop - low + sink, stop)
    found = torch.stack(
        [
            row[:, None].expand_as(keys),
            torch.arange(keys.shape[1]).expand_as(keys),
            first[:, None].expand_as(keys),
            torch.zeros_like(keys),
        ],
        dim=-1,
    )
    order = keys.flatten().argsort(descending=True, stable=True)
    return found.flatten(0, 1)[order].int()
