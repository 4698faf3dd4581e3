"""A way to run the model: what it is given, and what the benchmark asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model one system runs, as its process gets it.

    `plan`: what the system holds, which is everything for the dense ones. `package` or `shape`
    tells where our runtime gets weights, `source` or `shape` where transformers does. `cpu`: the
    instruction set of native kernels, None is the best here.
    """

    spec: ModelSpec
    plan: Plan
    dtype: str
    device: str
    backend: str
    cpu: str | None
    package: Path | None
    source: str | None
    shape: str | None
    gguf: Path | None
    threads: int | None
    seed: int


class System(Protocol):
    """One system with its weights loaded.

    `dtype`: of the weights, by name. `weight_bytes`: those a decode step reads. `kv_itemsize`:
    bytes of one number in its cache. `compiles_prefill`: prefill is compiled for its length.
    """

    compiles_prefill: bool
    dtype: str
    weight_bytes: int
    kv_itemsize: int

    def open(self, batch: int, capacity: int) -> None:
        """Start again with an empty cache for `batch` rows of at most `capacity` tokens."""

    def prefill(self, tokens: list[list[int]]) -> None:
        """Feed every row its tokens, all rows as many, and choose the next token of each."""

    def step(self) -> None:
        """Feed every row the token chosen last, and choose the next."""

    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
