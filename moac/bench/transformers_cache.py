"""transformers on the original model: its growing cache, and its static cache compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moac.bench.floor import weight_bytes_read
from moac.bench.shapes import shape_config
from moac.bench.system import Subject
from moac_runtime.package.dtypes import DTYPE_BYTES


class GrowingCache:
    """`DynamicCache`, which concatenates every token; see `System`."""

    compiles_prefill = False

    def __init__(self, subject: Subject) -> None:
        self.dtype = subject.dtype
        self.kv_itemsize = DTYPE_BYTES[subject.dtype]
        self.weight_bytes = weight_bytes_read(subject.spec, self.kv_itemsize)
        self._device = subject.device
        self._model = load_model(subject)
        self._cache: Any = None
        self._next: Tensor

    def open(self, batch: int, capacity: int) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    def prefill(self, tokens: list[list[int]]) -> None:
        self._next = self._forward(self._model, torch.tensor(tokens, device=self._device))

    def step(self) -> None:
        self._next = self._forward(self._model, self._next)

    def kv_bytes(self) -> int:
        held = (part for layer in self._cache.layers for part in (layer.keys, layer.values))
        return sum(part.untyped_storage().nbytes() for part in held)

    # not inference_mode: what is compiled keeps addresses of ordinary tensors
    @torch.no_grad()
    def _forward(self, model: Any, tokens: Tensor) -> Tensor:
        """The tokens chosen after `tokens` `[B, T]`, `[B, 1]`."""
        # the cache by its place: releases differ in what they call it
        out = model(tokens, None, None, self._cache, use_cache=True, logits_to_keep=1)
        chosen: Tensor = out.logits[:, -1:].argmax(-1)
        return chosen


class StaticCompiled(GrowingCache):
    """`StaticCache` and `torch.compile` of the decode step; prefill is not compiled."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        mode = "reduce-overhead" if subject.device == "cuda" else None
        self._compiled = torch.compile(self._model, mode=mode)

    def open(self, batch: int, capacity: int) -> None:
        from transformers import StaticCache

        if self._cache is None:
            self._cache = StaticCache(config=self._model.config, max_cache_len=capacity)
        else:  # the compiled step knows this one's addresses
            self._cache.reset()

    def step(self) -> None:
        # a CUDA graph's output is overwritten by its next run
        self._next = self._forward(self._compiled, self._next).clone()


def load_model(subject: Subject) -> Any:
    """The source's model, or one of the shape with the library's own random weights."""
    if subject.source is not None:
        from moac.checkpoint import open_checkpoint

        return open_checkpoint(subject.source).load_model(subject.dtype, subject.device)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(subject.seed)
    with torch.device(subject.device):
        model = AutoModelForCausalLM.from_config(
            shape_config(subject.shape or ""),
            dtype=getattr(torch, subject.dtype),
            attn_implementation="sdpa",
        )
    return model.eval().requires_grad_(False)
