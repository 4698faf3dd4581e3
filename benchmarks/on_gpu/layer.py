"""One layer's attention played as a session would, every output checked against the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moac_kernels.reference import layer_mask, masked_attention
from moac_kernels.shape import KernelShape
from moac_runtime.backends.cuda.decoder import ceil_div
from moac_runtime.backends.cuda.launch import Kernels
from moac_runtime.package.span import HeadSpan, visible

# Outputs are averages of unit normals: some roundings of the dtype, or of a float32 sum.
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


class Layer:
    """A cache of `batch` rows that is fed random queries, keys and values, kept as a history.

    `worst`: the largest error so far, as a share of the dtype's limit.
    """

    def __init__(
        self,
        kernels: Kernels,
        tables: Any,
        shape: KernelShape,
        heads: Sequence[HeadSpan],
        batch: int,
        device: torch.device,
    ) -> None:
        self._kernels, self._tables, self._shape = kernels, tables, shape
        self._heads, self._device = heads, device
        self._dtype: torch.dtype = getattr(torch, shape.dtype)
        slots = tables.cache_slots(heads, batch)
        # NaN: a slot that is read before it is written must show
        self._keys = torch.full((slots, shape.head_dim), torch.nan, dtype=self._dtype)
        self._keys = self._keys.to(device)
        self._values = self._keys.clone()
        self._sinks = 2 * torch.randn(shape.num_heads).to(device, self._dtype)
        self._spans = tables.span_table(heads, batch)
        self._history: list[list[Tensor]] = [[] for _ in range(batch)]
        self.worst = 0.0

    def lengths(self) -> list[int]:
        """Tokens fed to each row."""
        return [sum(len(part) for part in row) for row in self._history]

    def prefill(self, counts: Sequence[int]) -> None:
        """Feed each row some tokens at once."""
        starts, name = self.lengths(), "prefill_past"
        if not any(starts):
            name = "prefill"
        qkv = self._tokens(counts)
        rows = self._tables.prefill_rows(starts, counts)
        block = self._kernels.constant(name, "BLOCK_M")
        tiles = self._tables.prefill_tiles(self._spans, rows, block_m=block)
        out = qkv.new_full((len(qkv), self._shape.num_heads, self._shape.head_dim), 7.0)
        given = self._given(
            spans=self._spans, rows=rows, tiles=tiles, token_rows=self._tables.token_rows(rows)
        )
        grid = (len(tiles) * self._shape.group,)
        self._kernels.launch(name, grid, qkv=qkv, **given, out=out)
        self._kernels.launch("kv_write", (len(qkv),), qkv=qkv, **given)
        self._check(out.split(list(counts)))

    def decode(self, ahead: int) -> None:
        """Feed every row one token, by a work table made for `ahead` more."""
        shape, kernels, batch = self._shape, self._kernels, len(self._history)
        qkv = self._tokens([1] * batch)
        now = [length - 1 for length in self.lengths()]
        horizon = [position + ahead for position in now]
        work = self._tables.decode_work(self._spans, horizon, programs=kernels.programs)
        given = self._given(
            positions=torch.tensor(now, dtype=torch.int32),
            spans=self._spans,
            items=work.items,
            programs=work.programs,
            parts=work.parts,
        )
        one = torch.ones(batch, shape.head_dim // 2, device=self._device)
        norm = torch.ones(shape.head_dim, dtype=self._dtype, device=self._device)
        turn = {"cos": one, "sin": torch.zeros_like(one), "q_norm": norm, "k_norm": norm}
        heads = shape.num_heads + 2 * shape.num_kv_heads
        blocks = ceil_div(heads, kernels.constant("rope_decode", "HEAD_TILE"))
        kernels.launch("rope_decode", (batch, blocks), qkv=qkv, **turn, **given)
        room = self._tables.most_items(batch, shape.num_kv_heads, kernels.programs)
        sizes = {"partial": (room, shape.group, shape.head_dim), "weight": (room, shape.group)}
        given |= {
            name: torch.full(size, torch.nan, device=self._device) for name, size in sizes.items()
        }
        kernels.launch("decode", (kernels.programs,), qkv=qkv, **given)
        out = qkv.new_full((batch, shape.num_heads, shape.head_dim), 7.0)
        kernels.launch("combine", (batch * shape.num_heads,), **given, out=out)
        self._check(out.split(1))

    def _tokens(self, counts: Sequence[int]) -> Tensor:
        heads = self._shape.num_heads + 2 * self._shape.num_kv_heads
        qkv = torch.randn(sum(counts), heads, self._shape.head_dim).to(self._device, self._dtype)
        for row, part in enumerate(qkv.split(list(counts))):
            self._history[row].append(part.clone())
        return qkv

    def _given(self, **tables: Tensor) -> dict[str, Tensor]:
        """What kernels take by name: tables, on the device, and what the layer has."""
        placed = {name: table.to(self._device) for name, table in tables.items()}
        own = {"keys": self._keys, "values": self._values, "sink_logits": self._sinks}
        return {**placed, **own}

    def _check(self, found: Sequence[Tensor]) -> None:
        for row, part in enumerate(found):
            if not len(part):
                continue
            every = torch.cat(self._history[row]).transpose(0, 1)[None]
            kv_heads = self._shape.num_kv_heads
            q, k, v = every.split([self._shape.num_heads, kv_heads, kv_heads], dim=1)
            place = torch.arange(every.shape[2], device=self._device)
            mask = layer_mask(
                lambda query, key, head: visible(query, key, self._heads[head]),
                place[-len(part) :],
                place,
                kv_heads,
            )
            shape, scale = self._shape, self._shape.head_dim**-0.5
            cap, sinks = shape.score_cap, self._sinks if shape.sink_logits else None
            wanted = masked_attention(q[:, :, -len(part) :], k, v, mask, scale, cap, sinks=sinks)
            wanted = wanted[0]
            error = (part.transpose(0, 1).float() - wanted).abs().nan_to_num(torch.inf).max()
            self.worst = max(self.worst, float(error) / LIMITS[self._dtype])
