"""The tensors a spec calls for, by name and shape, and the check of what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moac.checkpoint.families import Names, family_of
from moac_runtime.errors import CheckpointError
from moac_runtime.package.spec import ExpertsSpec, LayerSpec, ModelSpec, NormSpec

Shape = tuple[int, ...]

# Buffers that old checkpoints saved; they are computed, never read.
_COMPUTED = (".rotary_emb.inv_freq",)


def expected_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint of `spec`, as its family names them."""
    hidden, names = spec.hidden_size, family_of(spec.family).names
    shapes: dict[str, Shape] = {
        f"{names.embed}.weight": (spec.vocab_size, hidden),
        **dict(_norm(names.norm, hidden, spec.norm)),
    }
    for index in range(spec.num_layers):
        prefix, own = f"{names.layers}.{index}", _layer(spec, spec.layer(index), names)
        shapes.update((f"{prefix}.{name}", shape) for name, shape in own)
    if not spec.tied_embeddings:
        shapes[f"{names.lm_head}.weight"] = (spec.vocab_size, hidden)
    return shapes


def _layer(spec: ModelSpec, layer: LayerSpec, names: Names) -> Iterator[tuple[str, Shape]]:
    hidden, mlp = spec.hidden_size, layer.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    before = (names.attn_norm,) if layer.parallel else (names.attn_norm, names.mlp_norm)
    after = (names.attn_post_norm, names.mlp_post_norm)
    for name in (*(before if layer.pre_norm else ()), *(after if layer.post_norm else ())):
        yield from _norm(name, hidden, layer.norm)
    if layer.qk_norm is not None:
        wide = layer.qk_norm == "width"
        yield f"{names.q_norm}.weight", (queries if wide else spec.head_dim,)
        yield f"{names.k_norm}.weight", (keys if wide else spec.head_dim,)
    yield from _stacked(names.qkv, (queries, keys, keys), hidden, layer.qkv_bias)
    yield from _linear(names.o, hidden, queries, layer.o_bias)
    if layer.sink_logits:
        yield names.sinks, (spec.num_heads,)
    if layer.experts is not None:
        yield from _experts(hidden, layer, layer.experts, names)
        return
    yield from _stacked(names.gate_up, (mlp, mlp), hidden, layer.mlp_bias)
    yield from _linear(names.down, hidden, mlp, layer.mlp_bias)


def _norm(name: str, width: int, norm: NormSpec) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if norm.bias:
        yield f"{name}.bias", (width,)


def _experts(
    hidden: int, layer: LayerSpec, own: ExpertsSpec, names: Names
) -> Iterator[tuple[str, Shape]]:
    mlp, count = layer.intermediate_size, own.count
    yield from _linear(names.router, count, hidden, own.router_bias)
    if names.transposed_experts:
        (both,) = names.expert_gate_up
        for name, rows, columns in ((both, 2 * mlp, hidden), (names.expert_down, hidden, mlp)):
            yield name, (count, columns, rows)
            if layer.mlp_bias:
                yield f"{name}_bias", (count, rows)
        return
    for index in range(count):
        parts = [name.format(index) for name in names.expert_gate_up]
        yield from _stacked(parts, (mlp, mlp), hidden, layer.mlp_bias)
        yield from _linear(names.expert_down.format(index), hidden, mlp, layer.mlp_bias)


def _stacked(
    names: Sequence[str], rows: Sequence[int], columns: int, bias: bool
) -> Iterator[tuple[str, Shape]]:
    """A matrix of several parts: each under its name, or all of it under one."""
    for name, count in zip(names, rows if len(names) > 1 else [sum(rows)], strict=True):
        yield from _linear(name, count, columns, bias)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def check_tensors(
    spec: ModelSpec, found: Mapping[str, Shape], where: str, *, config: str = "its config.json"
) -> None:
    """Raises CheckpointError where `found` (name to shape) is not exactly what `spec` calls for.

    A second copy of the embedding beside tied weights is allowed here; `where` names the files
    and `config` what the spec was read from.
    """
    expected = expected_tensors(spec)
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{where} lacks {_count(missing)} that {config} calls for; the checkpoint is "
            f"incomplete or {config} belongs to another model"
        )
    allowed = {*expected, f"{family_of(spec.family).names.lm_head}.weight"}
    surplus = [n for n in found if n not in allowed and not n.endswith(_COMPUTED)]
    if surplus:
        raise CheckpointError(
            f"{where} holds {_count(surplus)} that {config} has no place for; "
            f"{config} belongs to another model"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{where} holds {name} with shape {list(found[name])} where {config} calls "
                f"for {list(shape)}; {config} belongs to another model"
            )


def _count(names: list[str]) -> str:
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"the tensor {names[0]}{more}"
