"""How a package orders the numbers of a query or key head: as runtimes rotate them."""

from __future__ import annotations

from moac.checkpoint.families import family_of
from moac_runtime.package.spec import LayerSpec, ModelSpec


def key_orders(spec: ModelSpec) -> list[list[int]]:
    """Of each layer `order[place]`, the checkpoint's number of a key packed at that place."""
    return [key_order(spec, spec.layer(index)) for index in range(spec.num_layers)]


def key_order(spec: ModelSpec, layer: LayerSpec) -> list[int]:
    """Of one kind of layer."""
    dim = spec.head_dim
    if layer.rope is None:
        return list(range(dim))
    rotated = spec.ropes[layer.rope].rotated or dim
    return rotary_order(dim, rotated, pairs=family_of(spec.family).pairs)


def rotary_order(head_dim: int, rotated: int, *, pairs: bool) -> list[int]:
    """`order[place]` = the checkpoint's number of a query or key head to pack at that place.

    Runtimes rotate number `i` with number `i + head_dim / 2`. In a checkpoint the first `rotated`
    numbers rotate, each with the next one where they lie in `pairs`, else half of them apart; what
    does not rotate is shared out over the ends of both halves. Products of queries and keys are
    the same in any order.
    """
    step, second = (2, 1) if pairs else (1, rotated // 2)
    first = range(0, rotated if pairs else rotated // 2, step)
    still = range(rotated, head_dim)
    half = len(still) // 2
    return [*first, *still[:half], *(i + second for i in first), *still[half:]]
