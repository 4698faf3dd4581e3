"""How the matrices of a package are stored: each kind of matrix has a format of its own.

The formats: the package's dtype; "int8", whole numbers of -127 to 127 with a float32 scale for
each row; and "int4", numbers of 0 to 15, two a byte, with a bfloat16 scale and offset for each
group of a row. Norms, biases and the routers of experts are always of the package's dtype: of a
router's products only their order counts, which rounding would change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moac_runtime.package.spec import ModelSpec

WEIGHTS = ("full", "int8", "int4")
"""What a compile may ask for: every matrix in the package's dtype, every one in 8 bits, or those
of the layers in 4 bits and embedding and head in 8."""

GROUP, BLOCK = 32, 64
"""Of 4-bit weights: how many of a row share a scale, and how many lie together in memory."""

ROUTER = "router"
_OF_LAYERS = ("qkv", "o", "gate_up", "down")


def matrix_kinds(spec: ModelSpec) -> tuple[str, ...]:
    """The kinds of matrices that a package of `spec` holds."""
    head = () if spec.tied_embeddings else ("lm_head",)
    return ("embed", *_OF_LAYERS, *head)


def has_format(name: str, shape: Sequence[int]) -> bool:
    """Whether the weight `name` is a matrix that has a format: a router has none."""
    return len(shape) == 2 and kind_of(name) != ROUTER


def kind_of(name: str) -> str:
    """The kind of the matrix `name`, as `layers.0.qkv.weight`."""
    return name.split(".")[-2]


def format_of(kind: str, weights: str) -> str:
    """The format, "int8" or "int4", of a kind of matrix where `weights` are rounded."""
    return weights if kind in _OF_LAYERS else "int8"


def formats_of(kind: str, dtype: str) -> tuple[str, ...]:
    """The formats that a kind of matrix may have in a package of `dtype`."""
    return (dtype, "int8", "int4") if kind in _OF_LAYERS else (dtype, "int8")


def weight_formats(spec: ModelSpec, weights: str, dtype: str) -> dict[str, str]:
    """The formats of `weights`, one of `WEIGHTS`, in a package of `dtype`."""
    kinds = matrix_kinds(spec)
    return {kind: dtype if weights == "full" else format_of(kind, weights) for kind in kinds}


def described(formats: Mapping[str, str]) -> str:
    """The formats in a word, one of `WEIGHTS`, or "mixed" where kinds differ in another way."""
    found = {kind: format for kind, format in formats.items() if format in ("int8", "int4")}
    if not found:
        return "full"
    for weights in WEIGHTS[1:]:
        if formats == {kind: format_of(kind, weights) for kind in formats}:
            return weights
    return "mixed"


def padded_columns(columns: int) -> int:
    """Columns of 4-bit weights as they lie, in whole blocks."""
    return -(-columns // BLOCK) * BLOCK


def int4_obstacle(spec: ModelSpec) -> str | None:
    """Why a model is not packaged in 4 bits, None where it is."""
    if spec.head_dim % GROUP:
        return (
            f"--weights int4 needs a head_dim that is a multiple of {GROUP}, since heads are "
            f"permuted and a group may not straddle two, and the model has {spec.head_dim}; give "
            "--weights int8"
        )
    return None
