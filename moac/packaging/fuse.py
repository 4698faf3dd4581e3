"""Checkpoint weights in, package weights out: heads permuted, projections fused, by layer.

Heads under equal rules stand side by side, so that a runtime serves them as one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from moac.checkpoint.families import Names, family_of
from moac.checkpoint.key_order import key_order
from moac_runtime.errors import CheckpointError
from moac_runtime.package.kv_format import KV_BITS
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule
from moac_runtime.package.spec import ExpertsSpec, LayerSpec, ModelSpec
from moac_runtime.package.weight_formats import ROUTER

Source = Callable[[str], Tensor]


def head_order(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """`head_order[layer][position]` = the checkpoint's KV head to pack at that position.

    Widest rules first, equal rules adjacent (of equal spans those that are not rounded come first,
    then 8 bits), the checkpoint's order kept among equals.
    """
    return tuple(
        tuple(sorted(range(len(rules)), key=lambda head: _packed_by(rules[head])))
        for rules in plan.rules
    )


def _packed_by(rule: Rule) -> tuple[float, int, int]:
    full = max(KV_BITS) + 1
    return -rule.beta, -rule.alpha, -(rule.bits or full)


def pack_weights(
    tensor: Source, spec: ModelSpec, head_order: Sequence[Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield `(package name, tensor)` for every weight, one layer in memory at a time.

    `tensor`: the checkpoint's weight by its name (`model.layers.0.self_attn.q_proj.weight`), as
    the spec's family names it. Raises ValueError where an order is no permutation,
    CheckpointError where a weight's shape contradicts `spec`.
    """
    _check_order(spec, head_order)
    names, read = family_of(spec.family).names, _checked(tensor)
    table = (spec.vocab_size, spec.hidden_size)
    yield "embed.weight", read(f"{names.embed}.weight", table)
    for index, order in enumerate(head_order):
        layer = _Layer(read, names, spec, spec.layer(index), index)
        yield from layer.attention(order)
        yield from layer.mlp()
    for kind in _kinds(spec.norm.bias):
        yield f"norm.{kind}", read(f"{names.norm}.{kind}", (spec.hidden_size,))
    if not spec.tied_embeddings:
        yield "lm_head.weight", read(f"{names.lm_head}.weight", table)


def unpack_weights(
    packed: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    spec: ModelSpec,
    head_order: Sequence[Sequence[int]],
) -> Iterator[tuple[str, Tensor]]:
    """Yield `(checkpoint's name, tensor)` for all that package tensors `packed` were made of.

    `shapes`: of every tensor of the checkpoint. What `pack_weights` moves is found by packing
    places in place of weights.
    """
    read: list[str] = []

    def places(name: str) -> Tensor:
        first = sum(map(size, read))
        read.append(name)
        return torch.arange(first, first + size(name)).view(*shapes[name])

    def size(name: str) -> int:
        return prod(shapes[name])

    for name, where in pack_weights(places, spec, head_order):
        if name in packed:
            flat = packed[name].new_empty(where.numel())
            flat[where.flatten()] = packed[name].flatten()
            parts = flat.split([size(part) for part in read])
            yield from ((p, part.view(*shapes[p])) for p, part in zip(read, parts, strict=True))
        read.clear()


Read = Callable[[str, tuple[int, ...]], Tensor]


def _checked(tensor: Source) -> Read:
    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        found = tensor(name)
        if tuple(found.shape) != shape:
            raise CheckpointError(
                f"{name} has shape {list(found.shape)}, but config.json asks for {list(shape)}: "
                "weights and config.json do not belong together; download the checkpoint again"
            )
        return found

    return read


def _check_order(spec: ModelSpec, head_order: Sequence[Sequence[int]]) -> None:
    heads = list(range(spec.num_kv_heads))
    if len(head_order) != spec.num_layers:
        raise ValueError(
            f"head_order must have one entry per layer, got {len(head_order)} "
            f"for {spec.num_layers} layers"
        )
    for layer, order in enumerate(head_order):
        if sorted(order) != heads:
            raise ValueError(
                f"head_order[{layer}] must be a permutation of {heads}, got {list(order)}"
            )


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of the checkpoint, read part by part and told as the package has it."""

    read: Read
    names: Names
    spec: ModelSpec
    layer: LayerSpec
    index: int

    def attention(self, order: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        spec, layer, names, kv_heads = self.spec, self.layer, self.names, self.spec.num_kv_heads
        hidden, dim = spec.hidden_size, spec.head_dim
        heads = (spec.num_heads, kv_heads, kv_heads)
        if layer.pre_norm:
            yield from self._norm("attn_norm", names.attn_norm)
        for kind in _kinds(layer.qkv_bias):
            whole = self._stacked(names.qkv, kind, [count * dim for count in heads])
            q, k, v = whole.split([count * dim for count in heads])
            parts = self._turned(q), self._turned(k), v
            permuted = [_permuted(part, 0, order, kv_heads) for part in parts]
            yield self._name(f"qkv.{kind}"), torch.cat(permuted)
        if layer.qk_norm is not None:
            yield self._head_norm("q_norm", names.q_norm, spec.num_heads, order)
            yield self._head_norm("k_norm", names.k_norm, kv_heads, order)
        if layer.sink_logits:
            sinks = self._read(names.sinks, (spec.num_heads,))
            yield self._name("sink_logits.weight"), _permuted(sinks, 0, order, kv_heads)
        out = self._read(f"{names.o}.weight", (hidden, spec.num_heads * dim))
        yield self._name("o.weight"), _permuted(out, 1, order, kv_heads)
        if layer.o_bias:
            yield self._name("o.bias"), self._read(f"{names.o}.bias", (hidden,))
        if layer.post_norm:
            yield from self._norm("attn_post_norm", names.attn_post_norm)

    def mlp(self) -> Iterator[tuple[str, Tensor]]:
        layer, names = self.layer, self.names
        if layer.pre_norm and not layer.parallel:
            yield from self._norm("mlp_norm", names.mlp_norm)
        if layer.experts is None:
            for kind in _kinds(layer.mlp_bias):
                yield self._name(f"gate_up.{kind}"), self._gate_up(names.gate_up, kind)
            for kind in _kinds(layer.mlp_bias):
                yield self._name(f"down.{kind}"), self._down(names.down, kind)
        else:
            yield from self._router(layer.experts)
            yield from self._experts(layer.experts)
        if layer.post_norm:
            yield from self._norm("mlp_post_norm", names.mlp_post_norm)

    def _router(self, experts: ExpertsSpec) -> Iterator[tuple[str, Tensor]]:
        router, count = self.names.router, experts.count
        weight = self._read(f"{router}.weight", (count, self.spec.hidden_size))
        yield self._name(f"{ROUTER}.weight"), weight
        if experts.router_bias:
            yield self._name(f"{ROUTER}.bias"), self._read(f"{router}.bias", (count,))

    def _experts(self, experts: ExpertsSpec) -> Iterator[tuple[str, Tensor]]:
        """All experts of a layer, one under the other."""
        for kind in _kinds(self.layer.mlp_bias):
            yield self._name(f"experts.gate_up.{kind}"), self._all_gate_up(experts.count, kind)
        for kind in _kinds(self.layer.mlp_bias):
            yield self._name(f"experts.down.{kind}"), self._all_down(experts.count, kind)

    def _all_gate_up(self, count: int, kind: str) -> Tensor:
        names, inner = self.names.expert_gate_up, self.layer.intermediate_size
        if self.names.transposed_experts:  # there each gate stands before its up
            both = self._transposed(names[0], kind, count, 2 * inner, self.spec.hidden_size)
            return torch.cat([both[:, ::2], both[:, 1::2]], dim=1).flatten(0, 1)
        each = [[name.format(index) for name in names] for index in range(count)]
        return torch.cat([self._gate_up(parts, kind) for parts in each])

    def _all_down(self, count: int, kind: str) -> Tensor:
        name, hidden = self.names.expert_down, self.spec.hidden_size
        if self.names.transposed_experts:
            inner = self.layer.intermediate_size
            return self._transposed(name, kind, count, hidden, inner).flatten(0, 1)
        return torch.cat([self._down(name.format(index), kind) for index in range(count)])

    def _transposed(self, name: str, kind: str, count: int, rows: int, columns: int) -> Tensor:
        """`[count, rows, columns]` of a matrix, `[count, rows]` of a bias."""
        if kind == "bias":
            return self._read(f"{name}_bias", (count, rows))
        return self._read(name, (count, columns, rows)).mT

    def _gate_up(self, names: Sequence[str], kind: str) -> Tensor:
        return self._stacked(names, kind, [self.layer.intermediate_size] * 2)

    def _down(self, name: str, kind: str) -> Tensor:
        columns = (self.layer.intermediate_size,) if kind == "weight" else ()
        return self._read(f"{name}.{kind}", (self.spec.hidden_size, *columns))

    def _name(self, name: str) -> str:
        return f"layers.{self.index}.{name}"

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.read(f"{self.names.layers}.{self.index}.{name}", shape)

    def _norm(self, ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
        for kind in _kinds(self.layer.norm.bias):
            found = self._read(f"{theirs}.{kind}", (self.spec.hidden_size,))
            yield self._name(f"{ours}.{kind}"), found

    def _head_norm(
        self, ours: str, theirs: str, heads: int, order: Sequence[int]
    ) -> tuple[str, Tensor]:
        wide, dim = self.layer.qk_norm == "width", self.spec.head_dim
        weight = self._turned(self._read(f"{theirs}.weight", (heads * dim if wide else dim,)))
        if wide:
            weight = _permuted(weight, 0, order, self.spec.num_kv_heads)
        return self._name(f"{ours}.weight"), weight

    def _turned(self, weight: Tensor) -> Tensor:
        """Rows of query or key heads, `[heads * D, ...]`, in the order that runtimes rotate by."""
        dim = self.spec.head_dim
        order = key_order(self.spec, self.layer)
        if order == list(range(dim)):
            return weight
        heads = weight.reshape(-1, dim, *weight.shape[1:])
        return heads.index_select(1, torch.tensor(order)).reshape(weight.shape)

    def _stacked(self, names: Sequence[str], kind: str, rows: Sequence[int]) -> Tensor:
        """Parts one under the other, which the checkpoint may hold so already."""
        columns = (self.spec.hidden_size,) if kind == "weight" else ()
        held = rows if len(names) > 1 else [sum(rows)]
        parts = [
            self._read(f"{name}.{kind}", (count, *columns))
            for name, count in zip(names, held, strict=True)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _permuted(weight: Tensor, dim: int, order: Sequence[int], num_kv_heads: int) -> Tensor:
    """Reorder dimension `dim` by KV head; a KV head's query heads move together, in order."""
    before, after = weight.shape[:dim], weight.shape[dim + 1 :]
    groups = weight.reshape(*before, num_kv_heads, -1, *after)
    return groups.index_select(dim, torch.tensor(order)).reshape(weight.shape)
