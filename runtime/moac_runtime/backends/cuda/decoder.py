"""The decoder on the device: products by cuBLAS, all else by the package's own kernels.

Number for number the decoder of `moac_runtime.backends.torch.decoder`; attention is handed in
there and here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moac_runtime.backends.cuda.launch import Kernels
from moac_runtime.errors import ArtifactError
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.weights import expected_tensors

Attend = Callable[[int, Tensor], Tensor]
"""`attend(layer, qkv)`: `qkv` `[M, (H + 2K) D]` as projected; `[M, H D]`."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines `[M, D / 2]` of some positions, float32."""

    cos: Tensor
    sin: Tensor


class CudaDecoder:
    """A decoder-only model on one device in the dtype that `kernels` were built for.

    `tensors`: the package's weights by name (docs/FORMAT.md, "Weights"). Raises
    ArtifactError where one is missing or has another shape than `spec` says.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spec, self.kernels = spec, kernels
        self.dtype, self.device = dtype, device
        self._weights = {
            name: _checked(tensors, name, shape).to(device, dtype).contiguous()
            for name, shape in expected_tensors(spec).items()
        }
        head = "embed.weight" if spec.tied_embeddings else "lm_head.weight"
        self._head = self._weights[head]

    def rotation(self, frequencies: Tensor, positions: Tensor) -> Rotation:
        """The rotation of tokens at `positions` `[M]`, on the device as `frequencies` are.

        `frequencies` `[1, D / 2]`: of the model's one rotary table.
        """
        (rope,) = self.spec.ropes
        angle = positions[:, None].float() * frequencies[0]
        cos, sin = angle.cos() * rope.scaling, angle.sin() * rope.scaling
        # through the model's dtype, as transformers rounds them
        return Rotation(cos.to(self.dtype).float(), sin.to(self.dtype).float())

    def hidden(self, tokens: Tensor, attend: Attend) -> Tensor:
        """The normalised output `[M, hidden]` of `tokens` `[M]`; `logits` takes it."""
        x = F.embedding(tokens, self._weights["embed.weight"])
        normed = torch.empty_like(x)
        first = self._weights["layers.0.attn_norm.weight"]
        self.kernels.launch("rms_norm", (len(x),), x, first, normed)
        for index in range(self.spec.num_layers):
            layer = f"layers.{index}"
            out = attend(index, self._linear(f"{layer}.qkv", normed))
            self._add(x, self._linear(f"{layer}.o", out), f"{layer}.mlp_norm.weight", normed)
            inner = self.spec.layer(index).intermediate_size
            gated = self._gated(self._linear(f"{layer}.gate_up", normed), inner)
            last = index + 1 == self.spec.num_layers
            after = "norm.weight" if last else f"layers.{index + 1}.attn_norm.weight"
            self._add(x, self._linear(f"{layer}.down", gated), after, normed)
        return normed

    def logits(self, normed: Tensor) -> Tensor:
        """Float32 logits `[M, V]` of some rows of `hidden`'s output."""
        return F.linear(normed, self._head).float()

    def qk_norms(self, layer: int) -> tuple[Tensor, Tensor]:
        """The norms of queries and keys `[D]`; any tensor where the model has none."""
        if self.spec.layer(layer).qk_norm is None:
            return self._weights["norm.weight"], self._weights["norm.weight"]
        name = f"layers.{layer}"
        return self._weights[f"{name}.q_norm.weight"], self._weights[f"{name}.k_norm.weight"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _add(self, x: Tensor, delta: Tensor, norm: str, normed: Tensor) -> None:
        """Add `delta` to the residual `x` in place; the sum, normalised, goes into `normed`."""
        grid = (len(x),)
        self.kernels.launch("add_rms_norm", grid, x, delta, self._weights[norm], normed)

    def _gated(self, gate_up: Tensor, inner: int) -> Tensor:
        out = gate_up.new_empty(len(gate_up), inner)
        blocks = ceil_div(inner, self.kernels.constant("act_mul", "BLOCK"))
        self.kernels.launch("act_mul", (len(gate_up), blocks), gate_up, out)
        return out


def ceil_div(value: int, by: int) -> int:
    """`value / by`, rounded up."""
    return -(-value // by)


def _checked(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    found = tensors.get(name)
    if found is None or tuple(found.shape) != shape:
        what = "is missing" if found is None else f"has shape {list(found.shape)}"
        raise ArtifactError(
            f"the weight {name} {what}, but the model's spec expects one of shape "
            f"{list(shape)}; compile the package again"
        )
    return found
