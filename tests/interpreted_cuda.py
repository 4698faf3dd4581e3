"""The cuda backend on CPU tensors: its kernels in Triton's interpreter, in a process of its own.

`in_interpreter(function, ...)` runs a function of a test file there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from batches import Batch
from families import checkpoint_tensors
from torch import Tensor
from transformers import PreTrainedModel

from moac.checkpoint.families import model_spec
from moac.packaging.fuse import head_order, pack_weights
from moac.packaging.kernels import require_kernels
from moac_kernels.uncompiled import write_uncompiled
from moac_runtime.backends.cuda.binaries import Binary
from moac_runtime.backends.cuda.decoder import CudaDecoder
from moac_runtime.backends.cuda.session import CudaSession
from moac_runtime.backends.cuda.source import SourceKernels, load_source
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec

PROGRAMS = 5
CPU = torch.device("cpu")


def interpreter() -> Iterator[Callable[..., Any]]:
    """A fixture's body: `run(function, *arguments)` in the process that interprets."""
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        # the process takes it along: Triton reads it when it is imported, by whatever
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(torch.set_num_threads, 1).result()
    yield lambda function, *arguments: pool.submit(function, *arguments).result()
    pool.shutdown()


def open_session(
    model: PreTrainedModel, plan: Plan, *, capacity: int, batch: int = 1, chunk: int | None = None
) -> Batch:
    """Rows of a session of the cuda backend on `model` under `plan`, in float32."""
    return Batch(new_session(model, plan, chunk=chunk), batch=batch, capacity=capacity)


def new_session(model: PreTrainedModel, plan: Plan, *, chunk: int | None = None) -> CudaSession:
    """The same without rows."""
    spec, order, weights = model_spec(model.config), head_order(plan), checkpoint_tensors(model)
    tensors = dict(pack_weights(weights.__getitem__, spec, order))
    return session_of(spec, tensors, plan, chunk=chunk)


def session_of(
    spec: ModelSpec, tensors: dict[str, Tensor], plan: Plan, *, chunk: int | None = None
) -> CudaSession:
    """A session without rows on a package's weights by name."""
    kernels, tables = _kernels(spec, plan)
    decoder = CudaDecoder(spec, tensors, kernels, dtype=torch.float32, device=CPU)
    return CudaSession(decoder, plan, head_order(plan), tables, chunk=chunk)


@cache
def _kernels(spec: ModelSpec, plan: Plan) -> tuple[SourceKernels, Any]:
    root = Path(mkdtemp())
    made = write_uncompiled(root / "kernels", require_kernels(spec, plan, "float32"), block=16)
    described = {built.name: Binary.from_json(asdict(built)) for built in made}
    kernels = SourceKernels(root, described, programs=PROGRAMS)
    return kernels, load_source(root / "kernels" / "tables.py")
