"""Gated MLPs and mixtures of them, number for number as transformers computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moac_runtime.package.spec import ExpertsSpec, LayerSpec


@dataclass(frozen=True, slots=True)
class Linear:
    """`x` `[..., in]` times the transposed `weight` `[out, in]`, plus `bias` `[out]` if any."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def part(self, index: int, count: int) -> Linear:
        """One of `count` matrices that stand one under the other."""
        size = len(self.weight) // count
        rows = slice(size * index, size * (index + 1))
        return Linear(self.weight[rows], None if self.bias is None else self.bias[rows])


@dataclass(frozen=True, slots=True)
class Gate:
    """What stands between the two products of a layer's MLPs."""

    layer: LayerSpec
    activation: Callable[[Tensor], Tensor]

    def __call__(self, gate_up: Tensor) -> Tensor:
        """`[..., 2 I]`, gate and then up, to `[..., I]`."""
        gate, up = gate_up.chunk(2, dim=-1)
        limit, slope = self.layer.mlp_limit, self.layer.activation_slope
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        gate = self.activation(gate) if slope == 1 else self.activation(gate * slope) / slope
        return gate * (up + 1 if self.layer.up_plus_one else up)


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer's mixture of experts; `gate_up` and `down` hold all, one under the other."""

    spec: ExpertsSpec
    router: Linear
    gate_up: Linear
    gate: Gate
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """`x` `[M, hidden]`; of the experts those alone are read that some token chose."""
        shares, chosen = self.route(x)
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            token, place = torch.where(chosen == index)
            found = self._expert(index, x[token]) * shares[token, place, None]
            out.index_add_(0, token, found.to(out.dtype))
        return out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What each token's chosen experts count, and which they are, both `[M, chosen]`.

        Among equal logits torch chooses which; another backend may choose another.
        """
        shares: Tensor = self.router(x).softmax(-1, dtype=torch.float32)
        shares, chosen = shares.topk(self.spec.chosen, dim=-1)
        if self.spec.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(x.dtype), chosen

    def _expert(self, index: int, x: Tensor) -> Tensor:
        gate_up, down = (both.part(index, self.spec.count) for both in (self.gate_up, self.down))
        return down(self.gate(gate_up(x)))
