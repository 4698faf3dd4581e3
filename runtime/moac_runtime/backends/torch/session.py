"""A session on torch's own operators: each row with tensors of its own, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moac_runtime.backends.feeding import Piece, check_growth, cut, num_wanted
from moac_runtime.backends.layout import HeadRun, grown_runs, rope_tables
from moac_runtime.backends.own import OwnRows
from moac_runtime.backends.session import Feed, Snapshot
from moac_runtime.backends.torch.cache import SpanCache
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.rounding import Parts, format_of
from moac_runtime.backends.torch.steps import Share, StepAttention
from moac_runtime.package.plan import Plan

CHUNK = 512


@dataclass(slots=True)
class TorchRow:
    """One row: `layers[layer]` are its caches; `frequencies` `[tables, D / 2]` of RoPE."""

    capacity: int
    length: int
    layers: list[list[SpanCache]]
    frequencies: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, all layers and heads."""
        return sum(cache.bytes for layer in self.layers for cache in layer)


class TorchSession(OwnRows[TorchRow]):
    """See `backends.session.Session` and `OwnRows`; logits are inference tensors.

    A row's logits follow from what it was fed alone, but for rounding: torch's products may sum in
    another order beside more tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        head_order: Sequence[Sequence[int]],
        *,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__(decoder.spec.vocab_size, decoder, plan, head_order, chunk=chunk)
        self._decoder = decoder

    def release(self, row: int) -> None:
        """Free a row. Raises UsageError for one that is not there."""
        self._leave(row)

    @torch.inference_mode()
    def step(self, feeds: Sequence[Feed]) -> Tensor:
        """Feed some rows; float32 logits `[sum of wanted, V]`.

        Raises UsageError for feeds that cannot be meant and MoacError where a row would pass its
        capacity, before anything is fed.
        """
        rows = self._check_feeds(feeds)
        parts = list(cut(feeds, self._chunk))
        if len(parts) == 1:
            return self._run(feeds, parts[0], rows)
        logits = torch.empty(num_wanted(feeds), self._vocab_size, device=self._decoder.device)
        for pieces in parts:
            places = [p.place + i for p in pieces for i in range(len(p.wanted))]
            logits[places] = self._run(feeds, pieces, rows)
        return logits

    @torch.inference_mode()
    def snapshot(self, row: int) -> Snapshot:
        """A copy of the row. Raises UsageError for one that is not there."""
        found = self._row(row)
        held = [
            [(cache.run, *cache.filled(found.length)) for cache in layer] for layer in found.layers
        ]
        size = sum(part.nbytes for layer in held for part in _parts(layer))
        return Snapshot(size, found.length, found.capacity, self._origin, held)

    @torch.inference_mode()
    def restore(self, snapshot: Snapshot) -> int:
        """A new row from a copy. Raises UsageError for a snapshot of something else."""
        self._check_snapshot(snapshot)
        runs = [[run for run, _, _ in held] for held in snapshot.content]
        row = self._new_row(runs, snapshot.capacity)
        row.length = snapshot.length
        for caches, held in zip(row.layers, snapshot.content, strict=True):
            for cache, (_, keys, values) in zip(caches, held, strict=True):
                cache.fill(keys, values)
        return self._enter(row)

    @torch.inference_mode()
    def grow(self, row: int, capacity: int) -> None:
        """Move a row to new tensors. Raises UsageError for a capacity that is not larger."""
        found = self._row(row)
        check_growth(found.capacity, capacity)
        layers = []
        for caches, heads in zip(found.layers, self._spans(capacity), strict=True):
            grown = grown_runs([cache.run for cache in caches], heads, found.length)
            layers.append([caches[source].grown(run, moved) for run, source, moved in grown])
        found.capacity, found.layers = capacity, layers
        found.frequencies = self._frequencies(capacity)

    @torch.inference_mode()
    def _new_row(self, layers: list[list[HeadRun]], capacity: int) -> TorchRow:
        caches = [[self._cache(run) for run in runs] for runs in layers]
        return TorchRow(capacity, 0, caches, self._frequencies(capacity))

    def _parts(self, snapshot: Snapshot) -> Iterator[bytes]:
        for layer in snapshot.content:
            for part in _parts(layer):
                yield part.contiguous().view(torch.uint8).cpu().numpy().tobytes()

    def _held_bytes(self, row: TorchRow) -> int:
        filled = (cache.filled(row.length) for layer in row.layers for cache in layer)
        return sum(part.nbytes for both in filled for parts in both for part in parts)

    @torch.inference_mode()
    def _content(self, row: TorchRow, data: bytes) -> list[list[tuple[HeadRun, Parts, Parts]]]:
        rest = memoryview(bytearray(data))

        def taken(like: Tensor) -> Tensor:
            nonlocal rest
            part, rest = rest[: like.nbytes], rest[like.nbytes :]
            if not part:
                return like
            return torch.frombuffer(part, dtype=like.dtype).view(like.shape).to(like.device)

        def held(cache: SpanCache) -> tuple[HeadRun, Parts, Parts]:
            keys, values = cache.filled(row.length)
            return cache.run, tuple(map(taken, keys)), tuple(map(taken, values))

        return [[held(cache) for cache in layer] for layer in row.layers]

    def _cache(self, run: HeadRun) -> SpanCache:
        spec, decoder = self._decoder.spec, self._decoder
        held = format_of(spec.head_dim, decoder.dtype, run.layout.head.bits)
        return SpanCache(run, held, decoder.device)

    def _frequencies(self, capacity: int) -> Tensor:
        spec = self._decoder.spec
        tables = rope_tables(spec.ropes, spec.head_dim, capacity)
        return torch.tensor(tables, dtype=torch.float32, device=self._decoder.device)

    def _run(
        self, feeds: Sequence[Feed], pieces: Sequence[Piece], rows: Sequence[TorchRow]
    ) -> Tensor:
        """One pass of some pieces; their wanted logits `[sum of wanted, V]`, in their order."""
        fed: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        shares = []
        for piece in pieces:
            row, first = rows[piece.feed], len(fed)
            wanted += [first + index for index in piece.wanted]
            fed += feeds[piece.feed].tokens[piece.first : piece.stop]
            positions += range(row.length, row.length + piece.size)
            shares.append(Share(row.layers, row.length, slice(first, len(fed))))
        device = self._decoder.device
        rotations = self._decoder.rotations(
            _frequencies_of([(rows[piece.feed], piece.size) for piece in pieces]),
            torch.tensor(positions, device=device),
        )
        step = StepAttention(shares, self._decoder.spec, self._decoder.sink_logits)
        hidden = self._decoder.hidden(torch.tensor(fed, device=device), rotations, step)
        for piece in pieces:
            rows[piece.feed].length += piece.size
        return self._decoder.logits(hidden if len(wanted) == len(fed) else hidden[wanted])


def _parts(layer: Sequence[tuple[HeadRun, Parts, Parts]]) -> Iterator[Tensor]:
    """The tensors that a layer of a snapshot holds: of each run keys, then values."""
    return (part for _, keys, values in layer for part in (*keys, *values))


def _frequencies_of(parts: Sequence[tuple[TorchRow, int]]) -> Tensor:
    """The frequencies of some rows' tokens, so many of each.

    `[tables, D / 2]` where all rows share them, else `[tables, M, D / 2]`.
    """
    if len({row.capacity for row, _ in parts}) == 1:
        return parts[0][0].frequencies
    return torch.cat([row.frequencies[:, None].expand(-1, n, -1) for row, n in parts], dim=1)
