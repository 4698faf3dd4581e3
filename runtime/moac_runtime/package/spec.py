"""A decoder described by data: one spec covers Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding. `inv_freq` (`[head_dim / 2]`, float32 values) and `scaling` (the factor
    on cos and sin) are what the checkpoint's library computed for `kind`.

    `dynamic` alone depends on the sequence length; there `theta`, `factor` and `original_context`
    (tokens) give the frequencies of a session whose capacity passes `original_context`.
    """

    kind: str
    theta: float
    inv_freq: tuple[float, ...]
    scaling: float = 1.0
    factor: float = 1.0
    original_context: int | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes and options of one decoder-only model. `context`: the longest sequence in tokens.

    `windows[layer]`: the layer's own sliding window in tokens, None where it attends fully.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    norm_eps: float
    activation: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    rope: RopeSpec

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def kv_token_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values that one token costs one KV head."""
        return 2 * self.head_dim * itemsize

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values, inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Raises KeyError or TypeError where a field is missing or of the wrong kind."""
        values = {field.name: data[field.name] for field in fields(cls)}
        rope = dict(values["rope"])
        rope["inv_freq"] = tuple(float(f) for f in rope["inv_freq"])
        values["rope"] = RopeSpec(**rope)
        values["windows"] = tuple(values["windows"])
        return cls(**values)
