"""A decoder described by data: what each layer computes, and what stands around the layers.

A field with a default holds its neutral value there: the option changes nothing. Written as JSON
it is then left out (`records.py`), so that options can be added without touching older packages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moac_runtime.package import records
from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.span import dense_tokens

QK_NORMS = ("head", "width")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding. `inv_freq` (`[rotated / 2]`, float32 values) and `scaling` (the factor on
    cos and sin) are what the checkpoint's library computed for `kind`.

    `rotated`: how many numbers of a head turn, None for all. Two kinds depend on the sequence
    length, and have other frequencies in a session whose capacity passes `original_context`
    (tokens): `dynamic`, where they follow from `theta` and `factor`, and `longrope`, where they
    are `long_inv_freq`.
    """

    kind: str
    theta: float
    inv_freq: tuple[float, ...]
    scaling: float = 1.0
    factor: float = 1.0
    original_context: int | None = None
    rotated: int | None = None
    long_inv_freq: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMS norm: `x / sqrt(mean(x^2) + eps)` times the weight, or, with `plus_one`, 1 + weight.

    With `centred` it is a layer norm: the mean of `x` is taken from it first. `bias`: whether one
    is added, to all norms but those of queries and keys.
    """

    eps: float
    plus_one: bool = False
    centred: bool = False
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """A mixture of experts: `count` MLPs, of which a router gives every token to `chosen`.

    The router is a matrix, with `router_bias` and a bias, whose products are the experts' logits.
    A token goes to the experts of the largest, and what comes of it is the sum of their outputs,
    each times its share of the softmax over all logits, or, `normalised`, over the chosen ones'.
    """

    count: int
    chosen: int
    normalised: bool = False
    router_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One kind of layer. All its norms are of the kind `norm`.

    `query_scale`: the factor on the products of queries and keys. `window`: its own sliding
    window in tokens. `rope`: index into the model's tables, None for a layer without positions.
    `qk_norm`: "head" norms each query and key head alone, "width" all of a token's together.
    `logit_cap`: scores become `cap tanh(score / cap)`. `pre_norm`, `post_norm`: whether the inputs
    and the outputs of attention and MLP are normed, the outputs before they are added. With
    `parallel` the MLP is given what attention is given, by one norm, and both are added to it.
    `sink_logits`: each query head has a learned logit that stands in the softmax of every query
    beside its scores, and in nothing else.

    The MLP is `activation(gate) up`, whose widths are `intermediate_size`; with `experts` it is
    that of each expert. `activation_slope`: the activation is `activation(slope x) / slope`.
    `mlp_limit`: before that the gate is cut to at most the limit, up to within it. `up_plus_one`:
    1 + up takes the place of up. `mlp_bias`: of both its products, in every expert.
    """

    norm: NormSpec
    query_scale: float
    intermediate_size: int
    activation: str
    window: int | None = None
    rope: int | None = 0
    qk_norm: str | None = None
    logit_cap: float | None = None
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sink_logits: bool = False
    experts: ExpertsSpec | None = None
    activation_slope: float = 1.0
    mlp_limit: float | None = None
    up_plus_one: bool = False

    @property
    def mlp_width(self) -> int:
        """The width of what one token goes through: of all experts chosen for it together."""
        return self.intermediate_size * (1 if self.experts is None else self.experts.chosen)

    @property
    def stored_mlp_width(self) -> int:
        """The width of all MLPs together, chosen or not."""
        return self.intermediate_size * (1 if self.experts is None else self.experts.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes and options of one decoder-only model. `context`: the longest sequence in tokens.

    `kinds`: the distinct kinds of layers; `layers[i]`: the kind of layer `i`. `ropes`: the rotary
    tables that kinds refer to. `norm`: the last one. `embedding_scale` multiplies the embedding,
    `residual_scale` what every sublayer adds, `logit_scale` the logits, which then become
    `cap tanh(logit / cap)` by `logit_cap`.
    """

    family: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    tied_embeddings: bool
    norm: NormSpec
    ropes: tuple[RopeSpec, ...]
    kinds: tuple[LayerSpec, ...]
    layers: tuple[int, ...]
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None

    @classmethod
    def of_layers(cls, layers: Sequence[LayerSpec], **rest: Any) -> ModelSpec:
        """The spec of these layers, equal ones of one kind; `rest`: its other fields."""
        kinds = tuple(dict.fromkeys(layers))
        return cls(kinds=kinds, layers=tuple(kinds.index(layer) for layer in layers), **rest)

    def layer(self, index: int) -> LayerSpec:
        """What layer `index` is."""
        return self.kinds[self.layers[index]]

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's own sliding window in tokens, None where it attends fully."""
        return tuple(self.kinds[kind].window for kind in self.layers)

    @property
    def mlp_widths(self) -> tuple[int, ...]:
        """Each layer's `mlp_width`."""
        return tuple(self.kinds[kind].mlp_width for kind in self.layers)

    @property
    def stored_mlp_widths(self) -> tuple[int, ...]:
        """Each layer's `stored_mlp_width`."""
        return tuple(self.kinds[kind].stored_mlp_width for kind in self.layers)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def dense_tokens(self, capacity: int) -> int:
        """KV tokens that the model holds by itself at `capacity` tokens, its windows counted."""
        return dense_tokens(self.windows, self.num_kv_heads, capacity)

    def kv_token_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values that one token costs one KV head."""
        return self.kv_shape(itemsize).token_bytes()

    def kv_shape(self, itemsize: int) -> KvShape:
        """A key of one head in an engine whose numbers have `itemsize` bytes."""
        return KvShape(self.head_dim, itemsize)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values, inverse of `from_json`; neutral options are left out."""
        return records.to_json(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Raises KeyError or TypeError where a field is missing or of the wrong kind."""
        return records.from_json(cls, data)
