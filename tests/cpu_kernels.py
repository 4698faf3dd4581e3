"""The native CPU kernels under test: built once a run, opened on the same models as the oracle."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import Batch
from families import checkpoint_tensors
from transformers import PreTrainedModel

from moac.checkpoint.families import model_spec
from moac.packaging.fuse import head_order, pack_weights
from moac_kernels.cpu_build import build_cpu, build_obstacle
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.library import (
    INSTRUCTION_SETS,
    host_features,
    open_library,
    runnable_sets,
)
from moac_runtime.backends.cpu.session import CpuSession
from moac_runtime.package.plan import Plan

needs_compiler = pytest.mark.skipif(
    build_obstacle() is not None, reason=build_obstacle() or "CPU kernels can be built"
)
needs_avx2 = pytest.mark.skipif(
    not runnable_sets(["cpu"]), reason="this processor has none of the instruction sets"
)


@cache
def library(instruction_set: str) -> Any:
    """The kernels for an instruction set; skips the test where this processor has it not."""
    if not INSTRUCTION_SETS[instruction_set].issubset(host_features()):
        pytest.skip(f"this processor has no {instruction_set}")
    # what is open stays when its file goes
    with tempfile.TemporaryDirectory(prefix="moac-cpu-") as folder:
        build_cpu(Path(folder), [instruction_set])
        return open_library(Path(folder, f"{instruction_set}.so"))


def open_cpu_session(
    model: PreTrainedModel,
    plan: Plan,
    *,
    instruction_set: str,
    capacity: int,
    batch: int = 1,
    chunk: int = 512,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
) -> Batch:
    """Rows of a native session on `model` under `plan`, as `oracle.open_session` opens them."""
    spec, order, weights = model_spec(model.config), head_order(plan), checkpoint_tensors(model)
    tensors = {
        name: tensor.to(dtype).contiguous()
        for name, tensor in pack_weights(weights.__getitem__, spec, order)
    }
    engine = CpuEngine(
        library(instruction_set),
        spec,
        {name: tensor.data_ptr() for name, tensor in tensors.items()},
        dtype=str(dtype).removeprefix("torch."),
        threads=threads,
        memory=tensors,
    )
    return Batch(CpuSession(engine, plan, order, chunk=chunk), batch=batch, capacity=capacity)
