"""FlexAttention under the plan's masks: all tokens are kept, what a head cannot see is skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, StaticLayer

from moac.bench.system import Subject
from moac.bench.transformers_cache import GrowingCache
from moac.profiling.hooks import handing_down
from moac_runtime.package.span import HeadSpan

_NAME = "moac_flex"
_BLOCK = 128
_compiled = torch.compile(flex_attention, dynamic=False)


class Flex(GrowingCache):
    """transformers with a static cache and compiled FlexAttention in every layer."""

    compiles_prefill = True

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._model.set_attn_implementation(_NAME)
        self._hooks = list(handing_down(self._model))
        self._plan, self._group = subject.plan, subject.spec.group_size
        self._position = torch.zeros((), dtype=torch.int64, device=subject.device)
        self._capacity = 0
        self._layers: list[LayerMask] = []
        self._masks: dict[tuple[int, int], list[BlockMask]] = {}
        self._length = 0

    def open(self, batch: int, capacity: int) -> None:
        spans = self._plan.spans(capacity)
        # plain layers also where the model has sliding windows: the mask knows them
        self._cache = Cache(layers=[StaticLayer(max_cache_len=capacity) for _ in spans])
        self._layers = [LayerMask(heads, self._group, self._position) for heads in spans]
        self._masks, self._capacity, self._length = {}, capacity, 0

    @torch.no_grad()
    def _forward(self, model: Any, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        self._position.fill_(self._length)
        options = {"use_cache": True, "logits_to_keep": 1, "moac_blocks": self._blocks(count)}
        out = model(tokens, None, None, self._cache, **options)  # as in GrowingCache
        self._length += count
        chosen: Tensor = out.logits[:, -1:].argmax(-1)
        return chosen

    def _blocks(self, count: int) -> list[BlockMask]:
        """A mask a layer for `count` tokens from here on; made anew once a block is full."""
        key = (self._length // _BLOCK, count)
        if key not in self._masks:
            self._masks = {
                key: [layer.blocks(self._length, count, self._capacity) for layer in self._layers]
            }
        return self._masks[key]


class LayerMask:
    """Which keys the heads of one layer see, as FlexAttention asks for it.

    `position`: a tensor with the position of the first query, changed in place between steps.
    """

    def __init__(self, heads: Sequence[HeadSpan], group: int, position: Tensor) -> None:
        per_query = [head for head in heads for _ in range(group)]
        device = position.device
        self._sink = torch.tensor([head.sink for head in per_query], device=device)
        self._recent = torch.tensor([head.size - head.sink for head in per_query], device=device)
        window = heads[0].window  # a layer's own, the same for all its heads
        self._window = 2**31 - 1 if window is None else window
        self._seen = _seen(self._sink, self._recent, self._window, position)

    def blocks(self, first: int, count: int, keys: int) -> BlockMask:
        """The mask of `count` queries from position `first` against `keys` slots.

        One query stands for all that share its block, so that a mask serves a block of steps.
        """
        start = first // _BLOCK * _BLOCK if count == 1 else first
        low = torch.arange(start, start + count, _BLOCK, device=self._sink.device)[:, None]
        high = low + _BLOCK - 1
        k_low = torch.arange(0, keys, _BLOCK, device=self._sink.device)
        k_high = k_low + _BLOCK - 1
        sink, recent = self._sink[:, None, None], self._recent[:, None, None]
        some = (k_low <= high) & ((k_low < sink) | (low - k_high < recent))
        some &= low - k_high < self._window
        every = (k_high <= low) & ((k_high < sink) | (high - k_low < recent))
        every &= (high - k_low < self._window) & (k_high < keys)
        partial, full = _listed(some & ~every), _listed(every)
        return BlockMask.from_kv_blocks(
            *partial, *full, BLOCK_SIZE=_BLOCK, mask_mod=self._seen, seq_lengths=(count, keys)
        )


def _seen(
    sink: Tensor, recent: Tensor, window: int, position: Tensor
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`moac_runtime.package.span.visible`, in the operations that FlexAttention compiles."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + position - key
        near = (distance >= 0) & ((key < sink[head]) | (distance < recent[head]))
        return near & (distance < window)

    return seen


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are wanted and which, first in line: `[1, H, Q]`, `[1, H, Q, K]`."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1)[None].int(), order[None].int()


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    *,
    moac_blocks: Sequence[BlockMask],
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    mask = moac_blocks[int(module.layer_idx)]  # type: ignore[arg-type]
    capped = None if softcap is None else _capped(softcap)
    out = _compiled(query, key, value, capped, mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@cache
def _capped(cap: float) -> Callable[..., Tensor]:
    """How scores are capped; one function for each cap, so that it is compiled once."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


AttentionInterface.register(_NAME, _attend)
