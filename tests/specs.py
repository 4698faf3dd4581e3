"""Specs for tests that need no checkpoint: a model of equal layers, told in one line of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moac_runtime.package.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec

_OF_LAYERS = ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "intermediate_size", "post_norm")


def plain_spec(
    *,
    num_layers: int,
    rope: RopeSpec,
    norm_eps: float = 1e-5,
    windows: Sequence[int | None] | None = None,
    **values: Any,
) -> ModelSpec:
    """Llama's spec with these values; the options of `LayerSpec` hold for every layer."""
    own = {name: values.pop(name) for name in _OF_LAYERS if name in values}
    norm, scale = NormSpec(norm_eps), values["head_dim"] ** -0.5
    layers = [
        LayerSpec(norm=norm, query_scale=scale, activation="silu", window=window, **own)
        for window in windows or (None,) * num_layers
    ]
    return ModelSpec.of_layers(
        layers, **{"family": "llama", "norm": norm, "ropes": (rope,), **values}
    )
