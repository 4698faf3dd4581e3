"""A session on the device: the interface of `moac_runtime.backends.torch.session.Session`.

All its memory is allocated when it opens. Rows that leave keep theirs, and cost no time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moac_runtime.backends.cuda.cache import LayerCache, fresh_layouts
from moac_runtime.backends.cuda.decode import DecodeStep, bucket
from moac_runtime.backends.cuda.decoder import CudaDecoder
from moac_runtime.backends.cuda.device import free_bytes
from moac_runtime.backends.cuda.layers import Layers
from moac_runtime.backends.cuda.memory import check_fit, session_demand
from moac_runtime.backends.cuda.prefill import PrefillStep, Share
from moac_runtime.backends.feeding import check_growth, check_kept, check_sizes
from moac_runtime.backends.torch.base import TorchSession
from moac_runtime.package.plan import Plan


class CudaSession(TorchSession):
    """A session on the device: `batch` sequences of at most `capacity` tokens each.

    `tables`: the package's `kernels/tables.py`. `chunk`: tokens of a prefill step, None for what
    fits. Raises UsageError for a size below one, and MoacError where the device's memory does not
    suffice.
    """

    def __init__(
        self,
        decoder: CudaDecoder,
        plan: Plan,
        head_order: Sequence[Sequence[int]],
        tables: object,
        *,
        batch: int,
        capacity: int,
        chunk: int | None = None,
    ) -> None:
        check_sizes(batch=batch, capacity=capacity, chunk=1 if chunk is None else chunk)
        super().__init__(
            decoder.spec, decoder.device, plan, head_order, batch=batch, capacity=capacity
        )
        self._decoder = decoder
        self._asked_chunk = chunk
        self._chunk = self._fitting_chunk(batch, capacity, free_bytes(decoder.device))
        self._rows = list(range(batch))  # of the caches, for each row of the batch
        self._layers = Layers(
            [self._new_cache(layer) for layer in range(decoder.spec.num_layers)], tables
        )
        self._steps: dict[int, DecodeStep] = {}
        self._step: DecodeStep | None = None  # the one that serves the rows as they stand

    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, rows that left included."""
        return self._layers.bytes

    @torch.inference_mode()
    def extend_at(
        self, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Feed each row its `tokens`; float32 logits `[len(wanted[b]), V]` per row.

        `wanted[b]`: ascending indices into `tokens[b]`. Raises as `extend` does.
        """
        self._check_fed(tokens, wanted)
        self._step = None
        begin = self.lengths
        logits = [[self._no_logits(0)] for _ in tokens]
        while cuts := self._cuts(begin, tokens):
            shares = [
                Share(self._rows[row], begin[row] + cut.start, tokens[row][cut])
                for row, cut in cuts.items()
            ]
            normed = PrefillStep(self._decoder, self._layers, self._frequencies, shares).run()
            flat = 0
            for row, cut in cuts.items():
                places = [flat + i - cut.start for i in wanted[row] if cut.start <= i < cut.stop]
                if places:
                    logits[row].append(self._decoder.logits(normed[places]))
                flat += cut.stop - cut.start
                self._lengths[row] = begin[row] + cut.stop
        return [torch.cat(parts) for parts in logits]

    @torch.inference_mode()
    def decode(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """Feed each row one token, `tokens` `[B]`; float32 logits `[B, V]`. Raises as `extend`."""
        tokens = torch.as_tensor(tokens)
        self._check_step(tokens)
        if self._step is None:
            self._step = self._ready_step()
        logits = self._step.run(tokens, self._lengths)
        self._lengths = [length + 1 for length in self._lengths]
        return logits.clone()

    @torch.inference_mode()
    def grow(self, capacity: int) -> None:
        """Move to a larger capacity: every head gets its span there and keeps what it holds.

        As `moac_runtime.backends.torch.session.Session.grow` does. Raises UsageError for a
        capacity that is not larger, and MoacError where the device's memory does not suffice.
        """
        check_growth(self._capacity, capacity)
        self._make_room(self.batch, capacity)
        self._set_capacity(capacity)
        self._replace(
            self._layers.changed(
                lambda layer, cache: cache.selected(self._rows).grown(
                    self._heads(layer), self._lengths
                )
            )
        )

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a row named twice is copied.

        The memory of the others stays allocated, unless rows are copied. Raises UsageError for
        no rows and for a row that the batch does not have, and MoacError where copies do not fit.
        """
        check_kept(rows, self.batch)
        copied = len(set(rows)) < len(rows)
        if copied:
            self._make_room(len(rows), self._capacity)
        self._rows = [self._rows[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        self._step = None
        if copied:
            self._replace(self._layers.changed(lambda layer, cache: cache.selected(self._rows)))

    def _make_room(self, batch: int, capacity: int) -> None:
        """Free what is made anew, and see that what replaces it, layer by layer, fits."""
        self._steps, self._step = {}, None
        free = free_bytes(self._decoder.device) + self._layers.bytes
        self._chunk = self._fitting_chunk(batch, capacity, free)

    def _replace(self, layers: Layers) -> None:
        """Go on with caches that hold the rows of the batch in their order, and nothing else."""
        self._layers, self._rows = layers, list(range(self.batch))
        self._steps, self._step = {}, None

    def _ready_step(self) -> DecodeStep:
        """The step for as many rows as there are, told where they stand."""
        rows = bucket(self.batch, self._layers.batch)
        if rows not in self._steps:
            self._steps[rows] = DecodeStep(self._decoder, self._layers, self._frequencies, rows)
        self._steps[rows].steer(self._rows, self._lengths)
        return self._steps[rows]

    def _cuts(self, begin: Sequence[int], tokens: Sequence[Sequence[int]]) -> dict[int, slice]:
        """The next step's part of every row's tokens: rows one after another until it is full."""
        cuts, left = {}, self._chunk
        for row, fed in enumerate(tokens):
            first = self._lengths[row] - begin[row]
            count = min(left, len(fed) - first)
            if count:
                cuts[row] = slice(first, first + count)
                left -= count
        return cuts

    def _fitting_chunk(self, batch: int, capacity: int, free: int) -> int:
        """Tokens of a prefill step. Raises MoacError where the session does not fit in `free`."""
        spec, itemsize = self._decoder.spec, self._decoder.dtype.itemsize
        demand = session_demand(spec, self._plan, capacity, itemsize=itemsize)
        check_fit(demand, batch=batch, capacity=capacity, free=free)
        return self._asked_chunk or demand.chunk(batch, free)

    def _new_cache(self, layer: int) -> LayerCache:
        return LayerCache(
            fresh_layouts(self._heads(layer), self.batch),
            self.batch,
            head_dim=self._decoder.spec.head_dim,
            dtype=self._decoder.dtype,
            device=self._decoder.device,
        )
