"""The decoder: Llama, Mistral, Qwen2 and Qwen3 from one spec, number for number as transformers.

Tokens come flat, `[M]`, whatever rows and lengths they belong to; only attention has to know,
and it is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moac_runtime.errors import ArtifactError
from moac_runtime.package.spec import ModelSpec

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`attend(layer, q, k, v)`: `q` `[M, H, D]`, `k` and `v` `[M, K, D]`, rotated; `[M, H, D]`."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    attn_norm: Tensor
    qkv: _Linear
    # `[H + K, D]`: the query norm for each query head, the key norm for each key head
    qk_norm: Tensor | None
    o: _Linear
    mlp_norm: Tensor
    gate_up: _Linear
    down: _Linear


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines `[M, 1, D]` of some positions, in the model's dtype."""

    cos: Tensor
    # negated in its first half, so that the halves are swapped and not negated
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate `x` `[M, heads, D]`."""
        low, high = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((high, low), dim=-1) * self.sin


class Decoder:
    """A decoder-only model on one device in one dtype; it holds weights and no state.

    `tensors`: the package's weights by name, heads in packed order (ARCHITECTURE.md, "Package
    format"). `dtype`: None is the embedding's own. Raises ArtifactError where a weight is missing
    or has another shape than `spec` says, and for an activation not served.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec = spec
        self.dtype = dtype or _dtype(tensors)
        self.device = torch.device(device)
        self._activation = _activation(spec.activation)
        hidden = (spec.hidden_size,)
        self._embed = self._take(tensors, "embed.weight", (spec.vocab_size, *hidden))
        self._layers = [self._layer(tensors, f"layers.{i}") for i in range(spec.num_layers)]
        self._norm = self._take(tensors, "norm.weight", hidden)
        self._head = (
            self._embed
            if spec.tied_embeddings
            else self._take(tensors, "lm_head.weight", (spec.vocab_size, *hidden))
        )

    def rotation(self, frequencies: Tensor, positions: Tensor) -> Rotation:
        """The rotation of tokens at `positions` `[M]`.

        `frequencies`: float32, `[D / 2]` from `layout.rope_frequencies`, or `[M, 1, D / 2]` where
        rows have their own.
        """
        angle = positions[:, None, None].float() * frequencies.to(positions.device)
        cos, sin = angle.cos() * self.spec.rope.scaling, angle.sin() * self.spec.rope.scaling
        return Rotation(
            torch.cat((cos, cos), dim=-1).to(self.dtype),
            torch.cat((-sin, sin), dim=-1).to(self.dtype),
        )

    def hidden(self, tokens: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """The last layer's output `[M, hidden]` for `tokens` `[M]`; `logits` takes it."""
        x = F.embedding(tokens, self._embed)
        for index, layer in enumerate(self._layers):
            x = x + self._attention(index, layer, x, rotation, attend)
            x = x + self._mlp(layer, x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[..., V]` of some rows of `hidden` `[..., hidden]`."""
        return F.linear(self._rms_norm(hidden, self._norm), self._head).float()

    def _attention(
        self, index: int, layer: _Layer, x: Tensor, rotation: Rotation, attend: Attend
    ) -> Tensor:
        heads, kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        qkv = layer.qkv(self._rms_norm(x, layer.attn_norm)).view(len(x), -1, self.spec.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.qk_norm is not None:
            qk = self._rms_norm(qk, layer.qk_norm)
        qk = rotation(qk)
        out = attend(index, qk[:, :heads], qk[:, heads:], v)
        return layer.o(out.flatten(1))

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._rms_norm(x, layer.mlp_norm)).chunk(2, dim=-1)
        return layer.down(self._activation(gate) * up)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.spec.norm_eps)
        return weight * wide.to(x.dtype)

    def _take(self, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        found = tensors.get(name)
        if found is None:
            raise ArtifactError(
                f"the weight {name} is missing, expected one of shape {list(shape)}; "
                "compile the package again"
            )
        if tuple(found.shape) != shape:
            raise ArtifactError(
                f"the weight {name} has shape {list(found.shape)}, but the model's spec expects "
                f"{list(shape)}; compile the package again"
            )
        return found.to(self.device, self.dtype)

    def _linear(
        self, tensors: Mapping[str, Tensor], name: str, out: int, into: int, bias: bool
    ) -> _Linear:
        weight = self._take(tensors, f"{name}.weight", (out, into))
        return _Linear(weight, self._take(tensors, f"{name}.bias", (out,)) if bias else None)

    def _layer(self, tensors: Mapping[str, Tensor], name: str) -> _Layer:
        spec, hidden, inner = self.spec, self.spec.hidden_size, self.spec.intermediate_size
        queries, keys = spec.num_heads, spec.num_kv_heads
        width = (queries + 2 * keys) * spec.head_dim
        linear = partial(self._linear, tensors)
        return _Layer(
            attn_norm=self._take(tensors, f"{name}.attn_norm.weight", (hidden,)),
            qkv=linear(f"{name}.qkv", width, hidden, spec.qkv_bias),
            qk_norm=self._qk_norm(tensors, name) if spec.qk_norm else None,
            o=linear(f"{name}.o", hidden, queries * spec.head_dim, spec.o_bias),
            mlp_norm=self._take(tensors, f"{name}.mlp_norm.weight", (hidden,)),
            gate_up=linear(f"{name}.gate_up", 2 * inner, hidden, spec.mlp_bias),
            down=linear(f"{name}.down", hidden, inner, spec.mlp_bias),
        )

    def _qk_norm(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        shape = (self.spec.head_dim,)
        query = self._take(tensors, f"{name}.q_norm.weight", shape)
        key = self._take(tensors, f"{name}.k_norm.weight", shape)
        return torch.cat(
            [query.expand(self.spec.num_heads, -1), key.expand(self.spec.num_kv_heads, -1)]
        )


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    embed = tensors.get("embed.weight")
    return torch.float32 if embed is None else embed.dtype


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise ArtifactError(
            f"the activation {name!r} is not served, expected one of "
            f"{', '.join(sorted(_ACTIVATIONS))}; compile a model that uses one of these"
        )
    return _ACTIVATIONS[name]
