"""The tensors a spec calls for, by name and shape, and the check of what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moac_runtime.errors import CheckpointError
from moac_runtime.package.spec import ModelSpec

Shape = tuple[int, ...]

# Buffers that old checkpoints saved; they are computed, never read.
_COMPUTED = (".rotary_emb.inv_freq",)


def expected_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint of `spec`."""
    hidden = spec.hidden_size
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(spec.num_layers):
        shapes.update((f"model.layers.{layer}.{name}", shape) for name, shape in _layer(spec))
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


def _layer(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    hidden, mlp = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if spec.qk_norm:
        yield "self_attn.q_norm.weight", (spec.head_dim,)
        yield "self_attn.k_norm.weight", (spec.head_dim,)
    yield from _linear("self_attn.q_proj", queries, hidden, spec.qkv_bias)
    yield from _linear("self_attn.k_proj", keys, hidden, spec.qkv_bias)
    yield from _linear("self_attn.v_proj", keys, hidden, spec.qkv_bias)
    yield from _linear("self_attn.o_proj", hidden, queries, spec.o_bias)
    yield from _linear("mlp.gate_proj", mlp, hidden, spec.mlp_bias)
    yield from _linear("mlp.up_proj", mlp, hidden, spec.mlp_bias)
    yield from _linear("mlp.down_proj", hidden, mlp, spec.mlp_bias)


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
    allowed = {*expected, "lm_head.weight"}
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
