"""What the steps of a compile cost, in amounts that this machine's speed turns into seconds.

Amounts are floating-point operations, bytes or counts, as `Kind` tells. They compare steps of one
kind; how fast a kind is, `work.py` guesses ahead and a run finds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from moac_runtime.package.spec import ModelSpec

_PASSES_BACK = 3  # a forward pass, and twice as much backward
_PASSES_ROUNDING = 2  # through a layer: for what its matrices are given, and once rounded
_OPERATIONS_PER_BYTE = 20  # of a product, in the time that reading a byte of weights takes
_READ_AGAIN = 1.25  # retrieval is made anew where the answer is wrong
_WRITTEN = {"retrieval": 15, "quiz": 100, "documents": 120, "user": 100}  # answer tokens, about


class Kind(StrEnum):
    """Work that goes at one speed. Every step is of one kind."""

    LOAD = "load"  # bytes of weights
    BUILD = "build"  # native kernels, of one instruction set or architecture
    ANSWER = "answer"  # operations: the model reads and answers, token by token
    MEASURE = "measure"  # operations: it reads, under a plan
    BACKWARD = "backward"  # operations: forward and backward, in transformers
    SOLVE = "solve"  # planning programs
    WRITE = "write"  # bytes, written and hashed
    CHECK = "check"  # operations: golden logits and verification
    ROUND = "round"  # operations: rounding with feedback, in transformers and float32


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost of a model's steps. `itemsize`: bytes of a weight, as it is measured in."""

    spec: ModelSpec
    itemsize: int

    def forward(self, length: int, density: float = 1.0) -> float:
        """Operations of a pass over `length` tokens that attends to a share of its own keys."""
        keys = self.spec.dense_tokens(length) // self.spec.num_kv_heads
        return self._pass(length, keys * density)

    def backward(self, length: int) -> float:
        """Operations of profiling one sample of `length` tokens, own windows or none."""
        return _PASSES_BACK * self._pass(length, self.spec.num_layers * length)

    def _pass(self, length: int, keys: float) -> float:
        """`keys`: those that the last token attends to, over all layers."""
        spec, linear = self.spec, 2 * layers_weights(self.spec, self.spec.mlp_widths)
        # two products, each under a causal mask
        return float(length * linear + 2 * length * keys * spec.num_heads * spec.head_dim)

    def answer(self, domain: str, length: int) -> float:
        """Operations of making one sample, 0 of running text, which the model does not answer."""
        if domain not in _WRITTEN:
            return 0.0
        reads = self.forward(length) * (_READ_AGAIN if domain == "retrieval" else 1)
        return reads + _WRITTEN[domain] * self.decode()

    def decode(self) -> float:
        """Operations in whose time a token is decoded: it reads all but experts not chosen."""
        read = _with_tables(self.spec, self.spec.mlp_widths) * self.itemsize
        return float(read * _OPERATIONS_PER_BYTE)

    def rounding(self, windows: int, length: int, goes: int) -> float:
        """Operations of rounding layers with feedback: each matrix in so many `goes`.

        Matrices of experts, which go to nearest, count nothing.
        """
        spec, passes = self.spec, _PASSES_ROUNDING * windows * self.forward(length)
        inner = spec.num_heads * spec.head_dim
        attention = [(inner + 2 * spec.num_kv_heads * spec.head_dim, spec.hidden_size)]
        shapes = [*attention, (spec.hidden_size, inner)] * spec.num_layers
        for layer in map(spec.layer, range(spec.num_layers)):
            if layer.experts is None:
                width = layer.intermediate_size
                shapes += [(2 * width, spec.hidden_size), (spec.hidden_size, width)]
        sums = windows * length * sum(columns**2 for _, columns in shapes)
        return passes + 2 * (sums + goes * sum(rows * columns**2 for rows, columns in shapes))

    @property
    def weights(self) -> int:
        """Bytes of one copy of the weights."""
        return parameters(self.spec) * self.itemsize


def parameters(spec: ModelSpec) -> int:
    """Weights of the whole model."""
    return _with_tables(spec, spec.stored_mlp_widths)


def layers_weights(spec: ModelSpec, mlp_widths: Sequence[int]) -> int:
    """Weights of all layers, whose MLPs are so wide."""
    attention = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim * spec.hidden_size
    return spec.num_layers * attention + 3 * spec.hidden_size * sum(mlp_widths)


def _with_tables(spec: ModelSpec, mlp_widths: Sequence[int]) -> int:
    table = spec.vocab_size * spec.hidden_size
    return table * (1 if spec.tied_embeddings else 2) + layers_weights(spec, mlp_widths)
