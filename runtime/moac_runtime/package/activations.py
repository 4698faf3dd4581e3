"""The activations of a gated MLP: what each is called, and by whom. None: it has none there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Activation:
    """`library`: its names in configs of transformers. `torch`: of `torch.nn.functional`.

    `cpu`: its number in the CPU kernels. `onnx`: the operator, whose value multiplies the input
    where it is a `gate`. `triton`: of the templates. `options`: what torch and ONNX are given.
    """

    library: tuple[str, ...]
    torch: str
    cpu: int | None
    onnx: str | None
    triton: str | None
    gate: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


_TANH = {"approximate": "tanh"}
ACTIVATIONS = {
    "silu": Activation(("silu",), "silu", 0, "Sigmoid", "silu", gate=True),
    "gelu": Activation(("gelu",), "gelu", 1, "Gelu", "gelu"),
    "gelu_tanh": Activation(
        ("gelu_new", "gelu_pytorch_tanh"), "gelu", 2, "Gelu", "gelu_tanh", options=_TANH
    ),
    "relu": Activation(("relu",), "relu", 3, "Relu", "relu"),
}
