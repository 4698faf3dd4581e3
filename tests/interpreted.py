"""Runs rendered kernels in Triton's interpreter, on CPU tensors, in a process of its own.

Triton reads `TRITON_INTERPRET` when it is imported, and other tests compile for real.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torch import Tensor

from moac_kernels.render import render
from moac_kernels.shape import KernelShape

LLAMA = KernelShape(
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    hidden_size=96,
    intermediate_size=80,
    norm_eps=1e-5,
    activation="silu",
    windowed=False,
    dtype="float32",
    plan="0123456789abcdef",
)


def shape(
    num_kv_heads: int = 2, group: int = 4, head_dim: int = 64, **changes: Any
) -> KernelShape:
    """A small shape; `changes` are fields of `KernelShape`."""
    heads = {"num_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads}
    return replace(LLAMA, **{**heads, "head_dim": head_dim, **changes})


class Interpreter:
    """Launches kernels; what they write comes back into the tensors that were given."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _start)

    def __call__(
        self,
        kernels: KernelShape,
        source: str,
        entry: str,
        grid: Sequence[int],
        tensors: Sequence[Tensor],
        **constants: int | bool,
    ) -> None:
        """Run `entry` of the template `source`, rendered for `kernels`, over `grid`."""
        text = render(source, kernels)
        done = self._pool.submit(_launch, text, entry, tuple(grid), list(tensors), constants)
        for tensor, after in zip(tensors, done.result(), strict=True):
            tensor.copy_(after)

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


_loaded: dict[str, Any] = {}


def _launch(
    text: str, entry: str, grid: tuple[int, ...], tensors: list[Tensor], constants: dict[str, int]
) -> list[Tensor]:
    if text not in _loaded:
        _loaded[text] = _load(text)
    getattr(_loaded[text], entry)[grid](*tensors, **constants)
    return tensors


def _load(text: str) -> Any:
    folder = Path(tempfile.mkdtemp())
    path = folder / f"kernel_{len(_loaded)}.py"  # the interpreter reads the source as it runs
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
