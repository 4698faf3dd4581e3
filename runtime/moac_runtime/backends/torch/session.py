"""A session: a batch of token sequences, their KV caches, and the steps that extend them.

The capacity, in tokens, is fixed when a session opens and decides every head's span, so that the
memory held is exactly the planned one. `grow` moves to a larger capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from moac_runtime.backends.feeding import check_growth, check_kept, check_sizes
from moac_runtime.backends.torch.base import TorchSession
from moac_runtime.backends.torch.cache import SpanCache
from moac_runtime.backends.torch.decoder import Attend, Decoder
from moac_runtime.backends.torch.steps import DecodeStep, Group, PrefillStep, Segment
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import HeadSpan

# With many ragged rows a step's share of a row gets small; below this it would not pay.
_LEAST_SHARE = 64


class Session(TorchSession):
    """A session of the torch backend: `batch` sequences of at most `capacity` tokens each.

    `chunk`: tokens of prefill that share a step, per distinct row. Raises UsageError for a batch,
    capacity or chunk below one.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        head_order: Sequence[Sequence[int]],
        *,
        batch: int,
        capacity: int,
        chunk: int = 512,
    ) -> None:
        check_sizes(batch=batch, capacity=capacity, chunk=chunk)
        super().__init__(
            decoder.spec, decoder.device, plan, head_order, batch=batch, capacity=capacity
        )
        self._decoder = decoder
        self._chunk = chunk
        # A row's lengths whenever the session grew: rows that share them lost the same tokens.
        self._histories: list[tuple[int, ...]] = [()] * batch
        with torch.inference_mode():
            self._layers = [
                [self._group(run, self._new_cache(head, run)) for head, run in self._runs(layer)]
                for layer in range(decoder.spec.num_layers)
            ]

    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, all layers, heads and rows."""
        return sum(group.cache.bytes for layer in self._layers for group in layer)

    @torch.inference_mode()
    def extend_at(
        self, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Feed each row its `tokens`; float32 logits `[len(wanted[b]), V]` per row.

        `wanted[b]`: ascending indices into `tokens[b]`. Raises as `extend` does.
        """
        self._check_fed(tokens, wanted)
        begin = self.lengths
        ends = [start + len(row) for start, row in zip(begin, tokens, strict=True)]
        logits = [[self._no_logits(0)] for _ in tokens]
        while segments := self._segments(ends):
            hidden = self._prefill(segments, tokens, begin)
            for segment in segments:
                for row, flat in segment.shares():
                    first = segment.start - begin[row]
                    step = range(first, first + segment.count)
                    places = [flat + index - first for index in wanted[row] if index in step]
                    if places:
                        logits[row].append(self._decoder.logits(hidden[places]))
        return [torch.cat(parts) for parts in logits]

    @torch.inference_mode()
    def decode(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """Feed each row one token, `tokens` `[B]`; float32 logits `[B, V]`. Raises as `extend`."""
        tokens = torch.as_tensor(tokens)
        self._check_step(tokens)
        step = DecodeStep(self._layers, self._lengths, self._decoder.spec)
        hidden = self._run(tokens, self._lengths, step)
        self._lengths = [length + 1 for length in self._lengths]
        return self._decoder.logits(hidden)

    @torch.inference_mode()
    def grow(self, capacity: int) -> None:
        """Move to a larger capacity: every head gets its span there and keeps what it holds.

        Tokens dropped before stay dropped. With `dynamic` RoPE new tokens are rotated by the
        larger capacity's frequencies, and the keys already stored stay as they were rotated, as
        in transformers. Raises UsageError for a capacity that is not larger.
        """
        check_growth(self._capacity, capacity)
        self._set_capacity(capacity)
        for layer, groups in enumerate(self._layers):
            self._layers[layer] = [new for group in groups for new in self._grown(layer, group)]
        self._histories = [
            (*history, length)
            for history, length in zip(self._histories, self._lengths, strict=True)
        ]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; the memory of the others is freed.

        Raises UsageError for no rows and for a row that the batch does not have.
        """
        check_kept(rows, self.batch)
        for groups in self._layers:
            for group in groups:
                group.cache.keep(rows)
        self._lengths = [self._lengths[row] for row in rows]
        self._histories = [self._histories[row] for row in rows]

    def _runs(self, layer: int) -> Iterator[tuple[HeadSpan, slice]]:
        """Runs of adjacent heads with equal spans at the present capacity."""
        first = 0
        for head, run in groupby(self._heads(layer)):
            stop = first + sum(1 for _ in run)
            yield head, slice(first, stop)
            first = stop

    def _group(self, heads: slice, cache: SpanCache) -> Group:
        share = self._decoder.spec.group_size
        return Group(heads, slice(heads.start * share, heads.stop * share), cache)

    def _new_cache(self, head: HeadSpan, heads: slice) -> SpanCache:
        return SpanCache(
            head,
            batch=self.batch,
            num_heads=heads.stop - heads.start,
            head_dim=self._decoder.spec.head_dim,
            dtype=self._decoder.dtype,
            device=self._decoder.device,
        )

    def _grown(self, layer: int, group: Group) -> Iterator[Group]:
        """Heads that shared a span may part. They never join: they may hold different tokens."""
        for head, run in self._runs(layer):
            first, stop = max(run.start, group.heads.start), min(run.stop, group.heads.stop)
            if first < stop:
                part = slice(first - group.heads.start, stop - group.heads.start)
                cache = group.cache.grown(head, self._lengths, part)
                yield self._group(slice(first, stop), cache)

    def _segments(self, ends: Sequence[int]) -> list[Segment]:
        """The next step's share of every row that is not yet at its end, adjacent ones joined."""
        todo = [
            (length, end - length, history)
            for length, end, history in zip(self._lengths, ends, self._histories, strict=True)
        ]
        runs = [(key, sum(1 for _ in run)) for key, run in groupby(todo)]
        distinct = sum(1 for (_, left, _), _ in runs if left)
        share = max(min(self._chunk, _LEAST_SHARE), self._chunk // max(distinct, 1))
        segments, row, flat = [], 0, 0
        for (start, left, _), rows in runs:
            count = min(left, share)
            if count:
                tokens = slice(flat, flat + rows * count)
                segments.append(Segment(slice(row, row + rows), start, count, tokens))
                flat = tokens.stop
            row += rows
        return segments

    def _prefill(
        self,
        segments: Sequence[Segment],
        tokens: Sequence[Sequence[int]],
        begin: Sequence[int],
    ) -> Tensor:
        """One step of prefill; hidden states `[M, hidden]`, and the lengths move on."""
        fed: list[int] = []
        positions: list[int] = []
        for segment in segments:
            for row, _ in segment.shares():
                first = segment.start - begin[row]
                fed.extend(tokens[row][first : first + segment.count])
                positions.extend(range(segment.start, segment.start + segment.count))
        step = PrefillStep(self._layers, segments, self._decoder.spec)
        hidden = self._run(torch.tensor(fed), positions, step)
        for segment in segments:
            for row, _ in segment.shares():
                self._lengths[row] += segment.count
        return hidden

    def _run(self, tokens: Tensor, positions: Sequence[int], attend: Attend) -> Tensor:
        where = torch.tensor(positions, device=self._decoder.device)
        rotations = self._decoder.rotations(self._frequencies, where)
        return self._decoder.hidden(tokens.to(self._decoder.device), rotations, attend)
