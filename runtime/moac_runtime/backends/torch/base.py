"""What sessions on torch tensors have in common, whatever holds their caches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from moac_runtime.backends.feeding import check_room, check_step, check_tokens, check_vocabulary
from moac_runtime.backends.rows import Rows
from moac_runtime.backends.torch.decoder import rope_frequencies
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import HeadSpan
from moac_runtime.package.spec import ModelSpec


class TorchSession(Rows, ABC):
    """`batch` sequences of at most `capacity` tokens each (prompt and tokens to come).

    `head_order[layer][position]`: the checkpoint's KV head packed at that position, which finds
    a head's rule in `plan`. Logits are inference tensors: read them, or clone them to write.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        plan: Plan,
        head_order: Sequence[Sequence[int]],
        *,
        batch: int,
        capacity: int,
    ) -> None:
        self._spec, self._device = spec, device
        self._plan, self._head_order = plan, head_order
        self._lengths = [0] * batch
        self._set_capacity(capacity)

    @torch.inference_mode()
    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed each row its `tokens`; float32 logits `[B, V]` after the last token of each row.

        Rows may differ in number and may get none (their logits are NaN). Raises UsageError for
        tokens that are none, MoacError where a row would pass the capacity; nothing is fed then.
        """
        logits = self.extend_at(tokens, [[len(row) - 1] if row else [] for row in tokens])
        absent = self._no_logits(1).fill_(float("nan"))
        return torch.cat([row if len(row) else absent for row in logits])

    def extend_all(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """Feed each row its `tokens`; float32 logits `[T_b, V]` after each of them, per row."""
        return self.extend_at(tokens, [range(len(row)) for row in tokens])

    @abstractmethod
    def extend_at(
        self, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Feed each row its `tokens`; float32 logits `[len(wanted[b]), V]` per row.

        `wanted[b]`: ascending indices into `tokens[b]`. Raises as `extend` does.
        """

    def _check_fed(self, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> None:
        check_tokens(tokens, wanted, batch=self.batch, vocab_size=self._spec.vocab_size)
        check_room(self._lengths, [len(row) for row in tokens], self._capacity)

    def _check_step(self, tokens: Tensor) -> None:
        """Tokens that lie on a device are taken as they are: to look would wait for them."""
        check_step(tokens.shape, self.batch)
        if tokens.device.type == "cpu":
            check_vocabulary(int(tokens.min()), int(tokens.max()), self._spec.vocab_size)
        check_room(self._lengths, [1] * self.batch, self._capacity)

    def _set_capacity(self, capacity: int) -> None:
        self._capacity = capacity
        dim = self._spec.head_dim
        tables = [rope_frequencies(rope, dim, capacity) for rope in self._spec.ropes]
        self._frequencies = torch.stack(tables).to(self._device)

    def _heads(self, layer: int) -> list[HeadSpan]:
        """The spans of a layer's KV heads in packed order, at the present capacity."""
        return [self._plan.head(layer, head, self._capacity) for head in self._head_order[layer]]

    def _no_logits(self, rows: int) -> Tensor:
        return torch.empty(rows, self._spec.vocab_size, device=self._device)
