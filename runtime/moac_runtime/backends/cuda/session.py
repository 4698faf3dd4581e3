"""A session on the device, whose batch is fixed: all memory is allocated at its first step.

Rows that leave keep theirs until the last has left, and cost no time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moac_runtime.backends.cuda.cache import LayerCache
from moac_runtime.backends.cuda.decode import DecodeStep, bucket
from moac_runtime.backends.cuda.decoder import CudaDecoder
from moac_runtime.backends.cuda.device import free_bytes
from moac_runtime.backends.cuda.layers import Layers
from moac_runtime.backends.cuda.memory import check_fit, session_demand
from moac_runtime.backends.cuda.prefill import PrefillStep, Share
from moac_runtime.backends.feeding import (
    Piece,
    check_growth,
    check_sizes,
    cut,
    num_wanted,
    wanted_of,
)
from moac_runtime.backends.fixed import FixedRow, FixedRows
from moac_runtime.backends.layout import Layout, packed_spans, rope_tables
from moac_runtime.backends.session import Feed, Snapshot
from moac_runtime.backends.widths import refuse_widths
from moac_runtime.package.plan import Plan


class CudaSession(FixedRows):
    """See `backends.session.Session`; logits are inference tensors on the device.

    `head_order[layer][position]`: the checkpoint's KV head packed at that position, which finds
    a head's rule in `plan`. `tables`: the package's `kernels/tables.py`. `chunk`: tokens of a
    prefill step, None for what fits. Raises UsageError for a chunk below one.
    """

    def __init__(
        self,
        decoder: CudaDecoder,
        plan: Plan,
        head_order: Sequence[Sequence[int]],
        tables: object,
        *,
        chunk: int | None = None,
    ) -> None:
        check_sizes(chunk=1 if chunk is None else chunk)
        refuse_widths(plan, "cuda")
        super().__init__(decoder.spec.vocab_size, (decoder, plan, head_order))
        self._decoder, self._plan, self._head_order = decoder, plan, head_order
        self._asked_chunk, self._tables = chunk, tables
        self._chunk = 1
        self._layers = Layers([], tables)
        self._frequencies: Tensor
        self._steps: dict[int, DecodeStep] = {}
        self._steered: tuple[DecodeStep, list[int]] | None = None  # at rows as they stand

    @torch.inference_mode()
    def step(self, feeds: Sequence[Feed]) -> Tensor:
        """Feed some rows; float32 logits `[sum of wanted, V]`.

        Raises UsageError for feeds that cannot be meant and MoacError where a row would pass its
        capacity, before anything is fed.
        """
        rows = self._check_feeds(feeds)
        self._begin_once()
        if all(len(feed.tokens) == 1 for feed in feeds):
            return self._decode(feeds, rows)
        self._steered = None
        parts = list(cut(feeds, self._chunk))
        if len(parts) == 1:
            return self._prefill(feeds, parts[0], rows)
        logits = torch.empty(num_wanted(feeds), self._vocab_size, device=self._decoder.device)
        for pieces in parts:
            places = [p.place + i for p in pieces for i in range(len(p.wanted))]
            logits[places] = self._prefill(feeds, pieces, rows)
        return logits

    @torch.inference_mode()
    def snapshot(self, row: int) -> Snapshot:
        """A copy of the row. Raises UsageError for one that is not there."""
        found = self._row(row)
        content = found.content
        if self._begun:
            content = [cache.row(found.place, found.length) for cache in self._layers.caches]
        size = sum(x.nbytes for part in content or () for x in (*part.keys, *part.values))
        return Snapshot(size, found.length, found.capacity, self._origin, content)

    @torch.inference_mode()
    def grow(self, row: int, capacity: int) -> None:
        """Move the batch, which begins with it, to a larger capacity.

        Raises UsageError for a capacity that is not larger, and MoacError where the device's
        memory does not suffice.
        """
        check_growth(self._row(row).capacity, capacity)
        self._begin_once()
        self._make_room(capacity)
        rows = list(self._by_number.values())
        places, lengths = [row.place for row in rows], [row.length for row in rows]
        spans = packed_spans(self._plan, self._head_order, capacity)
        self._layers = self._layers.changed(
            lambda layer, cache: cache.grown(spans[layer], places, lengths)
        )
        self._set_frequencies(capacity)
        for place, present in enumerate(rows):
            present.capacity, present.place = capacity, place

    def kv_bytes(self, row: int | None = None) -> int:
        """Bytes of keys and values: of a row, or allocated, for rows that left included."""
        if row is not None:
            return self._row_bytes(self._row(row).capacity)
        if self._begun:
            return self._layers.bytes
        return sum(self._row_bytes(row.capacity) for row in self._by_number.values())

    # ---- the batch ----

    def _check_batch(self, batch: int, capacity: int) -> None:
        free = free_bytes(self._decoder.device)
        self._chunk = self._fitting_chunk(batch, capacity, free)

    def _begin(self, rows: list[FixedRow]) -> None:
        capacity = rows[0].capacity
        spans = packed_spans(self._plan, self._head_order, capacity)
        fresh = [tuple(map(Layout, heads)) for heads in spans]
        caches = []
        for layer, heads in enumerate(fresh):
            held = [row.content[layer] if row.content else None for row in rows]
            cache = self._new_cache([part.layouts if part else heads for part in held])
            for place, part in enumerate(held):
                if part is not None:
                    cache.fill(place, part)
            caches.append(cache)
        self._layers = Layers(caches, self._tables)
        self._set_frequencies(capacity)

    def _row_left(self, row: FixedRow) -> None:
        self._steered = None

    def _end(self) -> None:
        self._steps, self._steered = {}, None
        self._layers = Layers([], self._tables)

    def _make_room(self, capacity: int) -> None:
        """Free what is made anew, and see that what replaces it, layer by layer, fits."""
        self._steps, self._steered = {}, None
        free = free_bytes(self._decoder.device) + self._layers.bytes
        self._chunk = self._fitting_chunk(len(self._by_number), capacity, free)

    def _fitting_chunk(self, batch: int, capacity: int, free: int) -> int:
        """Tokens of a prefill step. Raises MoacError where the batch does not fit in `free`."""
        spec, itemsize = self._decoder.spec, self._decoder.dtype.itemsize
        demand = session_demand(spec, self._plan, capacity, itemsize=itemsize)
        check_fit(demand, batch=batch, capacity=capacity, free=free)
        return self._asked_chunk or demand.chunk(batch, free)

    def _new_cache(self, layouts: Sequence[tuple[Layout, ...]]) -> LayerCache:
        decoder = self._decoder
        return LayerCache(
            layouts, head_dim=decoder.spec.head_dim, dtype=decoder.dtype, device=decoder.device
        )

    def _row_bytes(self, capacity: int) -> int:
        token = self._decoder.spec.kv_token_bytes(self._decoder.dtype.itemsize)
        return self._plan.held_tokens(capacity) * token

    def _set_frequencies(self, capacity: int) -> None:
        spec = self._decoder.spec
        found = rope_tables(spec.ropes, spec.head_dim, capacity)
        self._frequencies = torch.tensor(found, dtype=torch.float32, device=self._decoder.device)

    # ---- steps ----

    def _decode(self, feeds: Sequence[Feed], rows: Sequence[FixedRow]) -> Tensor:
        """One token a row, by a recorded step."""
        places, lengths = [row.place for row in rows], [row.length for row in rows]
        if self._steered is None or self._steered[1] != places:
            self._steered = self._ready_step(places, lengths), places
        tokens = torch.tensor([feed.tokens[0] for feed in feeds])
        logits = self._steered[0].run(tokens, lengths)
        for row in rows:
            row.length += 1
        wanted = [index for index, feed in enumerate(feeds) if wanted_of(feed)]
        return logits.clone() if len(wanted) == len(feeds) else logits[wanted]

    def _ready_step(self, places: Sequence[int], lengths: Sequence[int]) -> DecodeStep:
        """The step for as many rows as there are, told where they stand."""
        rows = bucket(len(places), self._layers.batch)
        if rows not in self._steps:
            self._steps[rows] = DecodeStep(self._decoder, self._layers, self._frequencies, rows)
        self._steps[rows].steer(places, lengths)
        return self._steps[rows]

    def _prefill(
        self, feeds: Sequence[Feed], pieces: Sequence[Piece], rows: Sequence[FixedRow]
    ) -> Tensor:
        """One step of some pieces; their wanted logits, in their order."""
        shares, wanted, flat = [], [], 0
        for piece in pieces:
            row, tokens = rows[piece.feed], feeds[piece.feed].tokens
            shares.append(Share(row.place, row.length, tokens[piece.first : piece.stop]))
            wanted += [flat + index for index in piece.wanted]
            flat += piece.size
        normed = PrefillStep(self._decoder, self._layers, self._frequencies, shares).run()
        for piece in pieces:
            rows[piece.feed].length += piece.size
        return self._decoder.logits(normed[wanted])
