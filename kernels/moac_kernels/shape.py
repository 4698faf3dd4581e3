"""What the kernels of a model depend on, and the constants that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Triton's name, and bytes of an element.
DTYPES = {"bfloat16": ("bf16", 2), "float16": ("fp16", 2), "float32": ("fp32", 4)}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
QK_NORMS = (None, "head", "width")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelShape:
    """The model's side of the kernels. `windowed`: a layer has a sliding window of its own.

    `plan`: digest of the plan, named in the generated files. What has a default is neutral at it:
    `qk_norm`, `sink_logits`, `post_norm` and `residual_scale` are those of a model's layers,
    `norm_...` of all its norms. `query_scale`: the factor on scores, None is
    `head_dim ** -0.5`; `score_cap`: what they stay within. `plain_sums`: some sublayer's sum is
    not normalised. Raises ValueError for what no kernel serves.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    norm_eps: float
    activation: str
    windowed: bool
    dtype: str
    plan: str
    qk_norm: str | None = None
    query_scale: float | None = None
    score_cap: float | None = None
    sink_logits: bool = False
    norm_plus_one: bool = False
    norm_centred: bool = False
    norm_bias: bool = False
    post_norm: bool = False
    plain_sums: bool = False
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.head_dim % 16 or not 16 <= self.head_dim <= 256:
            raise ValueError(
                f"head_dim must be a multiple of 16 from 16 to 256, got {self.head_dim}"
            )
        if self.num_heads % self.num_kv_heads or self.group > 16:
            raise ValueError(
                "query heads must be 1 to 16 times the KV heads, got "
                f"{self.num_heads} and {self.num_kv_heads}"
            )
        for name, known in (
            ("dtype", DTYPES),
            ("activation", ACTIVATIONS),
            ("qk_norm", QK_NORMS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, known))}, "
                    f"got {getattr(self, name)}"
                )

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype][1]

    @property
    def dim_tile(self) -> int:
        """`head_dim`, padded to a power of two."""
        return padded(self.head_dim)

    def constants(self) -> dict[str, int | float | bool | str]:
        """Every constant that a template may name."""
        half = self.head_dim // 2
        scale = self.head_dim**-0.5 if self.query_scale is None else self.query_scale
        return {
            "HEADS": self.num_heads,
            "KV_HEADS": self.num_kv_heads,
            "GROUP": self.group,
            "GROUP_TILE": 16,
            "HEAD_DIM": self.head_dim,
            "DIM_TILE": self.dim_tile,
            "HALF": half,
            "HALF_TILE": padded(half),
            "TOKEN": (self.num_heads + 2 * self.num_kv_heads) * self.head_dim,
            "WIDTH_TILE": padded(self.num_heads * self.head_dim),
            "SCALE": scale * math.log2(math.e),
            "CAP": (self.score_cap or 0.0) * math.log2(math.e),
            "WINDOWED": self.windowed,
            "SINK_LOGITS": self.sink_logits,
            "QK_NORM": self.qk_norm == "head",
            "NORM_EPS": self.norm_eps,
            "NORM_PLUS_ONE": self.norm_plus_one,
            "NORM_CENTRED": self.norm_centred,
            "NORM_BIAS": self.norm_bias,
            "POST_NORM": self.post_norm,
            "RESIDUAL_SCALE": float(self.residual_scale),
            "HIDDEN": self.hidden_size,
            "HIDDEN_TILE": padded(self.hidden_size),
            "INNER": self.intermediate_size,
            "ACTIVATION": self.activation,
        }


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
