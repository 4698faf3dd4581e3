"""The options of a model in words: what it computes that the plainest decoder does not."""

from __future__ import annotations

from collections.abc import Iterator

from moac_runtime.package.spec import LayerSpec, ModelSpec, RopeSpec


def told_options(spec: ModelSpec) -> list[str]:
    """Each option of `spec` that is not at its neutral value, in the order of a pass."""
    return list(_told(spec))


def _told(spec: ModelSpec) -> Iterator[str]:
    layers = [spec.layer(index) for index in range(spec.num_layers)]
    if spec.embedding_scale != 1:
        yield f"embedding times {spec.embedding_scale:.4g}"
    if spec.tied_embeddings:
        yield "tied embeddings"
    if spec.group_size > 1:
        yield f"{spec.group_size} query heads a KV head"
    yield from _windows(spec)
    yield from _norms(layers)
    yield from _biases(layers)
    yield from _ropes(spec, layers)
    yield from _scores(spec, layers)
    yield from sorted({f"activation {layer.activation}" for layer in layers} - {"activation silu"})
    if len(set(spec.mlp_widths)) > 1:
        yield "layers of different widths"
    yield from _mlps(layers)
    if any(layer.parallel for layer in layers):
        yield "attention and MLP in parallel"
    if spec.residual_scale != 1:
        yield f"residuals times {spec.residual_scale:.4g}"
    if spec.logit_scale != 1:
        yield f"logits times {spec.logit_scale:.4g}"
    if spec.logit_cap is not None:
        yield f"cap of {spec.logit_cap:g} on logits"


def _windows(spec: ModelSpec) -> Iterator[str]:
    own = [window for window in spec.windows if window is not None]
    for window in sorted(set(own)):
        yield f"window of {window} tokens on {own.count(window)} of {spec.num_layers} layers"


def _norms(layers: list[LayerSpec]) -> Iterator[str]:
    norms = [layer.norm for layer in layers]
    if any(norm.centred for norm in norms):
        yield "layer norms with biases" if any(norm.bias for norm in norms) else "layer norms"
    if any(norm.plus_one for norm in norms):
        yield "norms by 1 + weight"
    if not all(layer.pre_norm for layer in layers):
        yield "no norms before sublayers"
    if any(layer.post_norm for layer in layers):
        yield "norms after sublayers"
    kinds = {layer.qk_norm for layer in layers} - {None}
    if "head" in kinds:
        yield "norms of each query and key head"
    if "width" in kinds:
        yield "norms of queries and keys across heads"


def _biases(layers: list[LayerSpec]) -> Iterator[str]:
    there = {
        "queries, keys and values": any(layer.qkv_bias for layer in layers),
        "attention's output": any(layer.o_bias for layer in layers),
        "MLPs": any(layer.mlp_bias for layer in layers),
    }
    yield from (f"biases of {name}" for name, found in there.items() if found)


def _ropes(spec: ModelSpec, layers: list[LayerSpec]) -> Iterator[str]:
    for rope in dict.fromkeys(spec.ropes):
        yield from _rope(rope, spec.head_dim)
    if len(spec.ropes) > 1:
        yield f"{len(spec.ropes)} rotary tables"
    still = sum(layer.rope is None for layer in layers)
    if still:
        yield f"no rotary embedding on {still} of {len(layers)} layers"


def _rope(rope: RopeSpec, head_dim: int) -> Iterator[str]:
    if rope.kind != "default":
        yield f"RoPE {rope.kind}"
    if rope.rotated is not None:
        yield f"{rope.rotated} of {head_dim} numbers of a head rotate"


def _scores(spec: ModelSpec, layers: list[LayerSpec]) -> Iterator[str]:
    for scale in sorted({layer.query_scale for layer in layers} - {spec.head_dim**-0.5}):
        yield f"scores times {scale:.4g}"
    for cap in sorted({layer.logit_cap for layer in layers if layer.logit_cap is not None}):
        yield f"cap of {cap:g} on scores"
    if any(layer.sink_logits for layer in layers):
        yield "a learned logit of each query head in the softmax"


def _mlps(layers: list[LayerSpec]) -> Iterator[str]:
    mixed = [layer.experts for layer in layers if layer.experts is not None]
    for own in dict.fromkeys(mixed):
        count = f"{own.chosen} of {own.count} experts a token"
        yield f"{count} on {mixed.count(own)} of {len(layers)} layers"
    for limit in sorted({layer.mlp_limit for layer in layers if layer.mlp_limit is not None}):
        yield f"gate and up cut at {limit:g}"
    for slope in sorted({layer.activation_slope for layer in layers} - {1}):
        yield f"activation of slope {slope:g}"
    if any(layer.up_plus_one for layer in layers):
        yield "1 + up in MLPs"
