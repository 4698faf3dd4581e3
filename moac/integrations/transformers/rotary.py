"""Rotary tables that follow the length: under a plan they follow the capacity, as in a package.

transformers chooses frequencies anew at every step, so what was stored stays rotated by others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moac_runtime.backends.layout import rope_frequencies
from moac_runtime.package.spec import ModelSpec, RopeSpec


def pin_frequencies(base: Any, spec: ModelSpec, capacity: int) -> Callable[[], None]:
    """Give such tables of a decoder the frequencies of a session of `capacity` tokens.

    The result, called, gives them their own back.
    """
    rotary = base.rotary_emb
    ropes = {kind: rope for kind, rope in _tables(rotary, spec).items() if rope.original_context}
    kinds, buffers = rotary.rope_type, {name: getattr(rotary, name) for name in map(_name, ropes)}
    for kind, rope in ropes.items():
        _set(rotary, _name(kind), torch.tensor(_rotated(rope, spec, capacity)))
        # any kind but those that the library would choose anew
        rotary.rope_type = "default" if kind is None else {**rotary.rope_type, kind: "default"}

    def undo() -> None:
        rotary.rope_type = kinds
        for name, own in buffers.items():
            _set(rotary, name, own)

    return undo


def _tables(rotary: Any, spec: ModelSpec) -> Mapping[str | None, RopeSpec]:
    """A decoder's tables by the kind of layer that they are for, None where there is but one."""
    if not isinstance(rotary.rope_type, dict):
        return {None: spec.ropes[0]}
    kinds = dict(zip(rotary.config.layer_types, range(spec.num_layers), strict=True))
    places = {kind: spec.layer(layer).rope for kind, layer in kinds.items()}
    return {kind: spec.ropes[place] for kind, place in places.items() if place is not None}


def _rotated(rope: RopeSpec, spec: ModelSpec, capacity: int) -> list[float]:
    """The frequencies of the numbers that rotate, which are all that transformers has."""
    return rope_frequencies(rope, spec.head_dim, capacity)[: (rope.rotated or spec.head_dim) // 2]


def _name(kind: str | None) -> str:
    return "inv_freq" if kind is None else f"{kind}_inv_freq"


def _set(rotary: Any, name: str, value: torch.Tensor) -> None:
    """Set a table, on the device that the model is on by now."""
    setattr(rotary, name, value.to(getattr(rotary, name).device))
