"""How the matrices of a package are stored: each kind of matrix has a format of its own.

The formats: the package's dtype, and "int8", whole numbers of -127 to 127 with a float32 scale
for each row. Norms, biases and the routers of experts are always of the package's dtype: of a
router's products only their order counts, which rounding would change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moac_runtime.package.spec import ModelSpec

WEIGHTS = ("full", "int8")
"""What a compile may ask for: every matrix in the package's dtype, or every one in 8 bits."""

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


def weight_formats(spec: ModelSpec, weights: str, dtype: str) -> dict[str, str]:
    """The formats of `weights`, one of `WEIGHTS`, in a package of `dtype`."""
    return dict.fromkeys(matrix_kinds(spec), "int8" if weights == "int8" else dtype)


def described(formats: Mapping[str, str]) -> str:
    """The formats in a word: "full", "int8", or "mixed" where kinds differ."""
    narrow = [format == "int8" for format in formats.values()]
    return "int8" if all(narrow) else "mixed" if any(narrow) else "full"
