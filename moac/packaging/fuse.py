"""Checkpoint weights in, package weights out: heads permuted, projections fused, by layer.

Heads under equal rules stand side by side, so that a runtime serves them as one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moac_runtime.errors import CheckpointError
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec

Source = Callable[[str], Tensor]


def head_order(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """`head_order[layer][position]` = the checkpoint's KV head to pack at that position.

    Widest rules first, equal rules adjacent, the checkpoint's order kept among equals.
    """
    return tuple(
        tuple(sorted(range(len(rules)), key=lambda head: (-rules[head].beta, -rules[head].alpha)))
        for rules in plan.rules
    )


def pack_weights(
    tensor: Source, spec: ModelSpec, head_order: Sequence[Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield `(package name, tensor)` for every weight, one layer in memory at a time.

    `tensor`: the checkpoint's weight by its name (`model.layers.0.self_attn.q_proj.weight`), as
    Llama, Mistral, Qwen2 and Qwen3 name them. Raises ValueError where an order is no permutation,
    CheckpointError where a weight's shape contradicts `spec`.
    """
    _check_order(spec, head_order)
    read = _checked(tensor)
    yield "embed.weight", read("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
    for layer, order in enumerate(head_order):
        yield from _attention(read, spec, layer, order)
        yield from _mlp(read, spec, layer)
    yield "norm.weight", read("model.norm.weight", (spec.hidden_size,))
    if not spec.tied_embeddings:
        yield "lm_head.weight", read("lm_head.weight", (spec.vocab_size, spec.hidden_size))


_Read = Callable[[str, tuple[int, ...]], Tensor]


def _checked(tensor: Source) -> _Read:
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


def _attention(
    read: _Read, spec: ModelSpec, layer: int, order: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    old, new = f"model.layers.{layer}", f"layers.{layer}"
    hidden, width = spec.hidden_size, spec.num_heads * spec.head_dim
    yield f"{new}.attn_norm.weight", read(f"{old}.input_layernorm.weight", (hidden,))
    yield f"{new}.qkv.weight", _qkv(read, spec, f"{old}.self_attn", "weight", order)
    if spec.qkv_bias:
        yield f"{new}.qkv.bias", _qkv(read, spec, f"{old}.self_attn", "bias", order)
    if spec.qk_norm:
        for name in ("q_norm", "k_norm"):
            weight = read(f"{old}.self_attn.{name}.weight", (spec.head_dim,))
            yield f"{new}.{name}.weight", weight
    out = read(f"{old}.self_attn.o_proj.weight", (hidden, width))
    yield f"{new}.o.weight", _permuted(out, 1, order, spec.num_kv_heads)
    if spec.o_bias:
        yield f"{new}.o.bias", read(f"{old}.self_attn.o_proj.bias", (hidden,))


def _qkv(read: _Read, spec: ModelSpec, prefix: str, kind: str, order: Sequence[int]) -> Tensor:
    columns = (spec.hidden_size,) if kind == "weight" else ()
    rows = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
    parts = (
        read(f"{prefix}.{letter}_proj.{kind}", (heads * spec.head_dim, *columns))
        for letter, heads in rows.items()
    )
    return torch.cat([_permuted(part, 0, order, spec.num_kv_heads) for part in parts])


def _permuted(weight: Tensor, dim: int, order: Sequence[int], num_kv_heads: int) -> Tensor:
    """Reorder dimension `dim` by KV head; a KV head's query heads move together, in order."""
    before, after = weight.shape[:dim], weight.shape[dim + 1 :]
    groups = weight.reshape(*before, num_kv_heads, -1, *after)
    return groups.index_select(dim, torch.tensor(order)).reshape(weight.shape)


def _mlp(read: _Read, spec: ModelSpec, layer: int) -> Iterator[tuple[str, Tensor]]:
    old, new = f"model.layers.{layer}", f"layers.{layer}"
    hidden, inner = spec.hidden_size, spec.intermediate_size
    yield f"{new}.mlp_norm.weight", read(f"{old}.post_attention_layernorm.weight", (hidden,))
    gate_up = [read(f"{old}.mlp.{part}_proj.weight", (inner, hidden)) for part in ("gate", "up")]
    yield f"{new}.gate_up.weight", torch.cat(gate_up)
    if spec.mlp_bias:
        biases = [read(f"{old}.mlp.{part}_proj.bias", (inner,)) for part in ("gate", "up")]
        yield f"{new}.gate_up.bias", torch.cat(biases)
    yield f"{new}.down.weight", read(f"{old}.mlp.down_proj.weight", (hidden, inner))
    if spec.mlp_bias:
        yield f"{new}.down.bias", read(f"{old}.mlp.down_proj.bias", (hidden,))
