"""One step of prefill: any number of new tokens of some rows, over what their caches hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moac_runtime.backends.cuda.decoder import CudaDecoder, Rotation, ceil_div
from moac_runtime.backends.cuda.device import upload
from moac_runtime.backends.cuda.layers import Layers


@dataclass(frozen=True, slots=True)
class Share:
    """A row's part of a step: `tokens` from position `start` on. `row`: of the caches."""

    row: int
    start: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Steering:
    """What the kernels are told of layers laid out alike."""

    spans: Tensor
    tiles: Tensor


class PrefillStep:
    """A step that adds the tokens of `shares` to their rows, laid end to end."""

    def __init__(
        self, decoder: CudaDecoder, layers: Layers, frequencies: Tensor, shares: Sequence[Share]
    ) -> None:
        self._decoder, self._layers = decoder, layers
        self._shares, self._frequencies = shares, frequencies
        counts = [len(share.tokens) for share in shares]
        rows = layers.tables.prefill_rows([share.start for share in shares], counts)
        # a row's earlier tokens cost a test of every tile, so there is a kernel without it
        self._kernel = "prefill_past" if any(share.start for share in shares) else "prefill"
        self._steering = [self._steer(spans, rows) for spans in layers.spans]
        self._token_rows = upload(layers.tables.token_rows(rows), decoder.device)
        self._rows = upload(rows, decoder.device)
        self._rotations: list[Rotation]

    def run(self) -> Tensor:
        """The normalised output `[M, hidden]` of all tokens; the caches hold them after it."""
        fed = [token for share in self._shares for token in share.tokens]
        places = [
            torch.arange(share.start, share.start + len(share.tokens)) for share in self._shares
        ]
        device = self._decoder.device
        positions = upload(torch.cat(places), device)
        self._rotations = self._decoder.rotations(self._frequencies, positions)
        return self._decoder.hidden(upload(torch.tensor(fed), device), self._attend)

    def _steer(self, spans: Tensor, rows: Tensor) -> _Steering:
        chosen = spans[[share.row for share in self._shares]]
        block_m = self._decoder.kernels.constant(self._kernel, "BLOCK_M")
        tiles = self._layers.tables.prefill_tiles(chosen, rows, block_m=block_m)
        device = self._decoder.device
        return _Steering(upload(chosen, device), upload(tiles, device))

    def _attend(self, layer: int, qkv: Tensor) -> Tensor:
        spec, kernels = self._decoder.spec, self._decoder.kernels
        heads = spec.num_heads + spec.num_kv_heads
        blocks = ceil_div(heads, kernels.constant("rope", "HEAD_TILE"))
        turn = self._decoder.turn(layer, self._rotations)
        kernels.launch("rope", (len(qkv), blocks), qkv=qkv, **turn)
        cache, steering = self._layers.caches[layer], self._steering[self._layers.kinds[layer]]
        held = {
            "qkv": qkv,
            "keys": cache.keys,
            "values": cache.values,
            "spans": steering.spans,
            "rows": self._rows,
        }
        out = qkv.new_empty(len(qkv), spec.num_heads * spec.head_dim)
        sinks = self._decoder.sink_logits(layer)
        grid = (len(steering.tiles) * spec.group_size,)
        kernels.launch(
            self._kernel, grid, **held, tiles=steering.tiles, sink_logits=sinks, out=out
        )
        # last: the queries still see what this overwrites
        kernels.launch("kv_write", (len(qkv),), **held, token_rows=self._token_rows)
        return out
