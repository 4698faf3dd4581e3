"""The decoder: every served family from one spec, number for number as transformers.

Tokens come flat, `[M]`, whatever rows and lengths they belong to; only attention has to know,
and it is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moac_runtime.backends.layout import rope_scalings
from moac_runtime.backends.torch.attention import capped
from moac_runtime.backends.torch.experts import Experts, Gate, Linear
from moac_runtime.errors import ArtifactError
from moac_runtime.package.activations import ACTIVATIONS
from moac_runtime.package.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`attend(layer, q, k, v)`: `q` `[M, H, D]`, `k` and `v` `[M, K, D]`, rotated; `[M, H, D]`."""


@dataclass(frozen=True, slots=True)
class _Norm:
    """A norm over the last dimension. Sums are float32, as is what `plus_one` multiplies by and
    all of a layer norm."""

    weight: Tensor
    spec: NormSpec
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.spec.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.spec.eps)
        if self.spec.plus_one:
            wide = wide * (1 + self.weight.float())
        elif self.spec.centred:
            wide = wide * self.weight.float()
        else:
            wide = self.weight * wide.to(x.dtype)
        return (wide if self.bias is None else wide.float() + self.bias.float()).to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    spec: LayerSpec
    attn_norm: Callable[[Tensor], Tensor]
    qkv: Linear
    qk_norm: Callable[[Tensor], Tensor]
    sink_logits: Tensor | None
    o: Linear
    attn_post_norm: Callable[[Tensor], Tensor]
    mlp_norm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    mlp_post_norm: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Mlp:
    gate_up: Linear
    gate: Gate
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.gate(self.gate_up(x)))


def _as_it_is(x: Tensor) -> Tensor:
    """Where a layer has no norm."""
    return x


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

    `tensors`: the package's weights by name, heads in packed order (docs/FORMAT.md,
    "Weights"). `dtype`: None is the embedding's own. Raises ArtifactError where a weight is
    missing or has another shape than `spec` says, and for an activation not served.
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
        hidden = (spec.hidden_size,)
        self._embed = self._take(tensors, "embed.weight", (spec.vocab_size, *hidden))
        self._layers = [
            self._layer(tensors, f"layers.{i}", spec.layer(i)) for i in range(spec.num_layers)
        ]
        self._norm = self._one_norm(tensors, "norm", spec.norm)
        self._head = (
            self._embed
            if spec.tied_embeddings
            else self._take(tensors, "lm_head.weight", (spec.vocab_size, *hidden))
        )

    def rotations(self, frequencies: Tensor, positions: Tensor) -> list[Rotation]:
        """The rotation of tokens at `positions` `[M]` by each of the model's rotary tables.

        `frequencies`: float32, `[tables, D / 2]` from `layout.rope_tables`, or
        `[tables, M, D / 2]` where rows have their own.
        """
        return [
            self._rotation(own, rope, positions)
            for rope, own in zip(self.spec.ropes, frequencies.to(positions.device), strict=True)
        ]

    def hidden(self, tokens: Tensor, rotations: Sequence[Rotation], attend: Attend) -> Tensor:
        """The last layer's output `[M, hidden]` for `tokens` `[M]`; `logits` takes it."""
        x = _scaled(F.embedding(tokens, self._embed), self.spec.embedding_scale)
        for index, layer in enumerate(self._layers):
            given = layer.attn_norm(x)
            out = layer.attn_post_norm(self._attention(index, layer, given, rotations, attend))
            x = x + _scaled(out, self.spec.residual_scale)
            if not layer.spec.parallel:
                given = layer.mlp_norm(x)
            out = layer.mlp_post_norm(layer.mlp(given))
            x = x + _scaled(out, self.spec.residual_scale)
        return x

    @property
    def sink_logits(self) -> list[Tensor | None]:
        """Of each layer: `[H]`, None where its softmax has the scores alone."""
        return [layer.sink_logits for layer in self._layers]

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[..., V]` of some rows of `hidden` `[..., hidden]`."""
        logits = F.linear(self._norm(hidden), self._head).float()
        return capped(_scaled(logits, self.spec.logit_scale), self.spec.logit_cap)

    def _rotation(self, frequencies: Tensor, rope: RopeSpec, positions: Tensor) -> Rotation:
        angle = (positions[:, None].float() * frequencies)[:, None]
        scaling: float | Tensor = rope.scaling
        if rope.rotated is not None:
            scaling = torch.tensor(rope_scalings(rope, self.spec.head_dim), device=self.device)
        cos, sin = angle.cos() * scaling, angle.sin() * scaling
        return Rotation(
            torch.cat((cos, cos), dim=-1).to(self.dtype),
            torch.cat((-sin, sin), dim=-1).to(self.dtype),
        )

    def _attention(
        self, index: int, layer: _Layer, x: Tensor, rotations: Sequence[Rotation], attend: Attend
    ) -> Tensor:
        heads, kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        qkv = layer.qkv(x).view(len(x), -1, self.spec.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        qk = layer.qk_norm(qk)
        if layer.spec.rope is not None:
            qk = rotations[layer.spec.rope](qk)
        out = attend(index, qk[:, :heads], qk[:, heads:], v)
        return layer.o(out.flatten(1))

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
    ) -> Linear:
        weight = self._take(tensors, f"{name}.weight", (out, into))
        return Linear(weight, self._take(tensors, f"{name}.bias", (out,)) if bias else None)

    def _one_norm(self, tensors: Mapping[str, Tensor], name: str, norm: NormSpec) -> _Norm:
        """A norm across the whole width."""
        width = (self.spec.hidden_size,)
        weight = self._take(tensors, f"{name}.weight", width)
        bias = self._take(tensors, f"{name}.bias", width) if norm.bias else None
        return _Norm(weight, norm, bias)

    def _layer(self, tensors: Mapping[str, Tensor], name: str, layer: LayerSpec) -> _Layer:
        spec, hidden = self.spec, self.spec.hidden_size
        queries, keys = spec.num_heads, spec.num_kv_heads
        width = (queries + 2 * keys) * spec.head_dim
        linear = partial(self._linear, tensors)

        def norm(which: str, there: bool) -> Callable[[Tensor], Tensor]:
            return self._one_norm(tensors, f"{name}.{which}", layer.norm) if there else _as_it_is

        return _Layer(
            spec=layer,
            attn_norm=norm("attn_norm", layer.pre_norm),
            qkv=linear(f"{name}.qkv", width, hidden, layer.qkv_bias),
            qk_norm=self._qk_norm(tensors, name, layer),
            sink_logits=(
                self._take(tensors, f"{name}.sink_logits.weight", (queries,))
                if layer.sink_logits
                else None
            ),
            o=linear(f"{name}.o", hidden, queries * spec.head_dim, layer.o_bias),
            attn_post_norm=norm("attn_post_norm", layer.post_norm),
            mlp_norm=norm("mlp_norm", layer.pre_norm and not layer.parallel),
            mlp=self._mlp(tensors, name, layer),
            mlp_post_norm=norm("mlp_post_norm", layer.post_norm),
        )

    def _mlp(
        self, tensors: Mapping[str, Tensor], name: str, layer: LayerSpec
    ) -> Callable[[Tensor], Tensor]:
        hidden, inner, bias = self.spec.hidden_size, layer.intermediate_size, layer.mlp_bias
        linear, gate = partial(self._linear, tensors), Gate(layer, _activation(layer.activation))
        own = layer.experts
        if own is None:
            gate_up = linear(f"{name}.gate_up", 2 * inner, hidden, bias)
            return _Mlp(gate_up, gate, linear(f"{name}.down", hidden, inner, bias))
        return Experts(
            own,
            linear(f"{name}.router", own.count, hidden, own.router_bias),
            linear(f"{name}.experts.gate_up", own.count * 2 * inner, hidden, bias),
            gate,
            linear(f"{name}.experts.down", own.count * hidden, inner, bias),
        )

    def _qk_norm(
        self, tensors: Mapping[str, Tensor], name: str, layer: LayerSpec
    ) -> Callable[[Tensor], Tensor]:
        """What norms queries and keys, `[M, H + K, D]`."""
        counts, dim = (self.spec.num_heads, self.spec.num_kv_heads), self.spec.head_dim
        if layer.qk_norm is None:
            return _as_it_is
        wide = layer.qk_norm == "width"
        query, key = (
            self._take(tensors, f"{name}.{which}.weight", (count * dim if wide else dim,))
            for which, count in zip(("q_norm", "k_norm"), counts, strict=True)
        )
        if not wide:
            # one norm for all: the query norm for each query head, the key norm for each key head
            weight = torch.cat([query.expand(counts[0], -1), key.expand(counts[1], -1)])
            return _Norm(weight, layer.norm)
        norms = _Norm(query, layer.norm), _Norm(key, layer.norm)

        def across(qk: Tensor) -> Tensor:
            parts = zip(norms, qk.split(counts, dim=1), strict=True)
            return torch.cat([norm(x.flatten(1)).view(x.shape) for norm, x in parts], dim=1)

        return across


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    embed = tensors.get("embed.weight")
    return torch.float32 if embed is None else embed.dtype


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    found = ACTIVATIONS.get(name)
    if found is None:
        raise ArtifactError(
            f"the activation {name!r} is not served, expected one of "
            f"{', '.join(sorted(ACTIVATIONS))}; compile a model that uses one of these"
        )
    return partial(getattr(F, found.torch), **found.options)
