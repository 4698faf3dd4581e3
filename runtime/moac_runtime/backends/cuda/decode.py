"""One step of decode: one token a row, recorded once and replayed for every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from moac_runtime.backends.cuda.decoder import CudaDecoder, Rotation, ceil_div
from moac_runtime.backends.cuda.device import recorded, refill
from moac_runtime.backends.cuda.layers import Layers

LOOKAHEAD = 64
"""Steps that a work table serves: runs end where a row ends, so it is right at each of them."""

_WORDS = 4  # int32 values in 16 bytes, what every table is aligned to


@dataclass(frozen=True, slots=True)
class _Steering:
    """What the kernels are told of layers laid out alike; views of one block of the device."""

    spans: Tensor
    items: Tensor
    programs: Tensor
    parts: Tensor


class DecodeStep:
    """A step for at most `rows` rows. All it reads and writes stays where it is.

    `steer` says which rows of the caches it serves; then every `run` feeds each of them a token.
    """

    def __init__(
        self, decoder: CudaDecoder, layers: Layers, frequencies: Tensor, rows: int
    ) -> None:
        spec, device = decoder.spec, decoder.device
        self._decoder, self._layers, self._frequencies = decoder, layers, frequencies
        self._rows, tables = rows, layers.tables
        # of each launch: no more than its spans can keep busy, the idle ones read tables too
        self._programs = [
            min(decoder.kernels.programs, tables.most_programs(spans[:rows]))
            for spans in layers.spans
        ]
        room = tables.most_items(rows, spec.num_kv_heads, max(self._programs))
        self._shapes = {
            "spans": (rows, spec.num_kv_heads, 8),
            "items": (room, 4),
            "programs": (max(self._programs) + 1,),
            "parts": (rows * spec.num_kv_heads + 1,),
        }
        words = sum(map(_padded, self._shapes.values()))
        self._block = torch.zeros(len(layers.spans), words, dtype=torch.int32, device=device)
        self._steering = [_Steering(**self._views(part)) for part in self._block]
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, dtype=torch.int32, device=device)
        self._active = torch.zeros(rows, dtype=torch.int32, device=device)
        self._partial = torch.empty(room, spec.group_size, spec.head_dim, device=device)
        self._weight = torch.empty(room, spec.group_size, device=device)
        self._spans: list[Tensor] = []
        self._left = 0
        self._rotations: list[Rotation]
        self._logits: Tensor
        self.steer([], [])
        self._look_ahead([])
        self._run = recorded(self._step, device)

    def steer(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Serve these rows of the caches, which hold so many tokens; the other rows idle."""
        idle = self._rows - len(rows)
        served = [*rows, *[0] * idle]
        self._spans = [spans[served] for spans in self._layers.spans]
        positions = torch.tensor([*lengths, *[-1] * idle], dtype=torch.int32)
        refill(self._positions, positions)
        refill(self._active, (positions >= 0).int())
        self._left = 0

    def run(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Feed `tokens` `[n]` to the rows served, which hold `lengths`; float32 logits `[n, V]`.

        The next run overwrites them.
        """
        if self._left == 0:
            self._look_ahead(lengths)
        self._left -= 1
        self._tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        self._run()
        return self._logits[: len(tokens)]

    def _look_ahead(self, lengths: Sequence[int]) -> None:
        """Share the work of the next steps out among the programs, in one copy."""
        idle = self._rows - len(lengths)
        horizon = [*(length + LOOKAHEAD - 1 for length in lengths), *[-1] * idle]
        block = torch.zeros(self._block.shape, dtype=torch.int32)
        for part, spans, programs in zip(block, self._spans, self._programs, strict=True):
            work = self._layers.tables.decode_work(spans, horizon, programs=programs)
            views = self._views(part)
            views["spans"].copy_(spans)
            views["items"][: len(work.items)] = work.items
            views["programs"][: len(work.programs)] = work.programs
            views["parts"].copy_(work.parts)
        refill(self._block, block)
        self._left = LOOKAHEAD

    def _step(self) -> None:
        """What is recorded: from tokens and positions to logits and the next positions."""
        self._rotations = self._decoder.rotations(self._frequencies, self._positions)
        self._logits = self._decoder.logits(self._decoder.hidden(self._tokens, self._attend))
        self._positions.add_(self._active)

    def _attend(self, layer: int, qkv: Tensor) -> Tensor:
        spec, kernels = self._decoder.spec, self._decoder.kernels
        cache, kind = self._layers.caches[layer], self._layers.kinds[layer]
        steering = self._steering[kind]
        held = {
            "qkv": qkv,
            "keys": cache.keys,
            "values": cache.values,
            "spans": steering.spans,
            "positions": self._positions,
        }
        heads = spec.num_heads + 2 * spec.num_kv_heads
        blocks = ceil_div(heads, kernels.constant("rope_decode", "HEAD_TILE"))
        turn = self._decoder.turn(layer, self._rotations)
        kernels.launch("rope_decode", (self._rows, blocks), **held, **turn)
        found = {"partial": self._partial, "weight": self._weight}
        grid = (self._programs[kind],)
        shared = {"items": steering.items, "programs": steering.programs}
        kernels.launch("decode", grid, **held, **shared, **found)
        out = qkv.new_empty(self._rows, spec.num_heads * spec.head_dim)
        sinks = self._decoder.sink_logits(layer)
        grid = (self._rows * spec.num_heads,)
        kernels.launch("combine", grid, **found, parts=steering.parts, sink_logits=sinks, out=out)
        return out

    def _views(self, block: Tensor) -> dict[str, Tensor]:
        """The tables in a layer kind's part of the block, by name."""
        views, first = {}, 0
        for name, shape in self._shapes.items():
            views[name] = block[first : first + prod(shape)].view(shape)
            first += _padded(shape)
        return views


def bucket(rows: int, most: int) -> int:
    """The rows of the step that serves `rows` of a session of `most`: powers of two, and `most`.

    A recorded step has a fixed number of rows; those that idle cost it their share of products.
    """
    return min(1 << (rows - 1).bit_length(), most)


def _padded(shape: tuple[int, ...]) -> int:
    return -(-prod(shape) // _WORDS) * _WORDS
