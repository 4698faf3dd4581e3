"""The decoder on the device: products by cuBLAS, all else by the package's own kernels.

Number for number the decoder of `moac_runtime.backends.torch.decoder`; attention is handed in
there and here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moac_runtime.backends.cuda.launch import Kernels
from moac_runtime.backends.layout import rope_scalings
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
        scalings = [rope_scalings(rope, spec.head_dim) for rope in spec.ropes]
        # here, since a recorded step may copy nothing from the host
        self._scalings = torch.tensor(scalings, dtype=torch.float32, device=device)
        self._still = any(layer.rope is None for layer in spec.kinds)
        self._norm_kernel = "layer_norm" if spec.norm.centred else "rms_norm"

    def rotations(self, frequencies: Tensor, positions: Tensor) -> list[Rotation]:
        """The rotation of tokens at `positions` `[M]` by each of the model's rotary tables, and
        one that turns nothing where some layer has none.

        `frequencies`: float32 `[tables, D / 2]`, on the device as `positions` are.
        """
        parts = zip(frequencies, self._scalings, strict=True)
        found = [self._rotation(own, scaling, positions) for own, scaling in parts]
        if self._still:
            one = torch.ones(len(positions), self.spec.head_dim // 2, device=self.device)
            found.append(Rotation(one, torch.zeros_like(one)))
        return found

    def turn(self, layer: int, rotations: Sequence[Rotation]) -> dict[str, Tensor]:
        """What rotates queries and keys of a layer, and norms each of their heads `[D]`.

        Any tensor stands for norms that the model has not.
        """
        rope = self.spec.layer(layer).rope
        own = rotations[-1 if rope is None else rope]
        return {"cos": own.cos, "sin": own.sin, **self._qk_norms(layer)}

    def sink_logits(self, layer: int) -> Tensor:
        """Each query head's logit beside its scores `[H]`; any tensor where there are none."""
        return self._given(f"layers.{layer}.sink_logits.weight")

    def hidden(self, tokens: Tensor, attend: Attend) -> Tensor:
        """The normalised output `[M, hidden]` of `tokens` `[M]`; `logits` takes it."""
        spec = self.spec
        x = F.embedding(tokens, self._weights["embed.weight"])
        if spec.embedding_scale != 1:
            x = x * spec.embedding_scale
        normed = torch.empty_like(x)
        given = self._first(x, normed)
        for index in range(spec.num_layers):
            layer, name = spec.layer(index), f"layers.{index}"
            qkv = self._linear(f"{name}.qkv", given)
            if layer.qk_norm == "width":
                self.kernels.launch("qk_norm", (len(x), 2), qkv=qkv, **self._qk_norms(index))
            out = self._linear(f"{name}.o", attend(index, qkv))
            # in parallel the MLP is given what attention was given
            norm = f"{name}.mlp_norm" if layer.pre_norm and not layer.parallel else None
            summed = self._add(x, out, f"{name}.attn", norm, normed)
            given = given if layer.parallel else summed
            gated = self._gated(self._linear(f"{name}.gate_up", given), layer.intermediate_size)
            out = self._linear(f"{name}.down", gated)
            given = self._add(x, out, f"{name}.mlp", self._norm_after(index), normed)
        return given

    def logits(self, normed: Tensor) -> Tensor:
        """Float32 logits `[M, V]` of some rows of `hidden`'s output."""
        logits, cap = F.linear(normed, self._head).float(), self.spec.logit_cap
        if self.spec.logit_scale != 1:
            logits.mul_(self.spec.logit_scale)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _rotation(self, frequencies: Tensor, scaling: Tensor, positions: Tensor) -> Rotation:
        angle = positions[:, None].float() * frequencies
        cos, sin = angle.cos() * scaling, angle.sin() * scaling
        # through the model's dtype, as transformers rounds them
        return Rotation(cos.to(self.dtype).float(), sin.to(self.dtype).float())

    def _qk_norms(self, layer: int) -> dict[str, Tensor]:
        name = f"layers.{layer}"
        return {which: self._given(f"{name}.{which}.weight") for which in ("q_norm", "k_norm")}

    def _given(self, name: str) -> Tensor:
        """A weight; where the model has none, any tensor, for an argument that is not read."""
        return self._weights.get(name, self._weights["norm.weight"])

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm_after(self, layer: int) -> str | None:
        """The norm of what a layer leaves, which is the next one's or the last of all."""
        if layer + 1 == self.spec.num_layers:
            return "norm"
        following = f"layers.{layer + 1}.attn_norm"
        return following if self.spec.layer(layer + 1).pre_norm else None

    def _first(self, x: Tensor, normed: Tensor) -> Tensor:
        """What the first layer is given: `x`, or `normed`."""
        if not self.spec.layer(0).pre_norm:
            return x
        norm = self._norm("layers.0.attn_norm")
        self.kernels.launch(self._norm_kernel, (len(x),), x=x, **norm, out=normed)
        return normed

    def _norm(self, name: str, prefix: str = "") -> dict[str, Tensor]:
        kinds = ("weight", "bias")
        return {f"{prefix}{kind}": self._given(f"{name}.{kind}") for kind in kinds}

    def _add(
        self, x: Tensor, delta: Tensor, sublayer: str, norm: str | None, normed: Tensor
    ) -> Tensor:
        """Add what a sublayer found to the residual `x` in place; returns what follows is given:
        `x`, or `normed`, where `norm` names how."""
        kernel, out = ("add", x) if norm is None else (f"add_{self._norm_kernel}", normed)
        self.kernels.launch(
            kernel,
            (len(x),),
            x=x,
            delta=delta,
            **self._norm(f"{sublayer}_post_norm", "post_"),
            **self._norm(norm or "norm"),
            out=out,
        )
        return out

    def _gated(self, gate_up: Tensor, inner: int) -> Tensor:
        out = gate_up.new_empty(len(gate_up), inner)
        blocks = ceil_div(inner, self.kernels.constant("act_mul", "BLOCK"))
        self.kernels.launch("act_mul", (len(gate_up), blocks), gate_up=gate_up, out=out)
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
