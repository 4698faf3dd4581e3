"""The checkpoint on this project's runtime, before there is a package: it answers, and measures.

The same function as transformers computes; on a CPU by the native kernels where they can be built
and run, which read several times as fast as torch's operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from moac.packaging.cpu_kernels import built_library, cpu_obstacle
from moac.packaging.fuse import pack_weights
from moac_kernels.build import BuildError
from moac_kernels.cpu_build import build_key
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.library import (
    CPU_TARGETS,
    choose_set,
    open_library,
    products,
    runnable_sets,
)
from moac_runtime.backends.cpu.opening import CpuModel
from moac_runtime.backends.session import Backend, Feed, Session
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.opening import TorchModel
from moac_runtime.package.plan import Plan, dense_plan

if TYPE_CHECKING:
    from moac.calibration import CalibrationSample
    from moac.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Reader:
    """A checkpoint's weights, to be read with under any plan. `dense`: `backend`'s own.

    `runs`: by what, torch or native kernels of which instruction set, sources and compiler.
    """

    runs: str
    eos_token_ids: tuple[int, ...]
    dense: Plan
    backend: Backend

    def session(self) -> Session:
        """A session without rows, under which nothing is dropped."""
        return self.backend.session()

    def answer_loss(self, sample: CalibrationSample, plan: Plan | None) -> float:
        """Mean loss in nats of the answer tokens under `plan`; None is the dense model."""
        session = self.backend.session(plan)
        places = [place for span in sample.believed for place in range(*span)]
        tokens, wanted = sample.token_ids[: places[-1]], [place - 1 for place in places]
        logits = session.step([Feed(session.admit(sample.length), tokens, wanted)])
        answers = torch.tensor([sample.token_ids[place] for place in places])
        scores: Tensor = torch.as_tensor(logits)
        return float(F.cross_entropy(scores, answers.to(scores.device)))


def open_reader(checkpoint: Checkpoint, dtype: str, device: torch.device, kept: Path) -> Reader:
    """A reader in `dtype`: of the native kernels on a CPU that they serve, else of torch.

    Kernels that are built stay below the folder `kept`, where packaging finds them too.
    """
    spec = checkpoint.spec
    order = [tuple(range(spec.num_kv_heads))] * spec.num_layers
    tensors = dict(pack_weights(checkpoint.tensor, spec, order))
    dense = dense_plan(
        spec.num_layers, spec.num_kv_heads, sink=0, block=1, min_span=1, windows=spec.windows
    )
    library = _native(checkpoint, dtype, kept) if device.type == "cpu" else None
    if library is None:
        decoder = Decoder(spec, tensors, dtype=getattr(torch, dtype), device=device)
        return Reader("torch", checkpoint.eos_token_ids, dense, TorchModel(decoder, dense, order))
    held = {name: t.to(getattr(torch, dtype)).contiguous() for name, t in tensors.items()}
    addresses = {name: t.data_ptr() for name, t in held.items()}
    engine = CpuEngine(open_library(library), spec, addresses, dtype=dtype, memory=held)
    return Reader(
        f"{library.stem} {build_key([library.stem])}",
        checkpoint.eos_token_ids,
        dense,
        CpuModel(engine, dense, order, library.stem, products(library.stem, dtype)),
    )


def _native(checkpoint: Checkpoint, dtype: str, kept: Path) -> Path | None:
    """The kernels for this processor, built if need be; None where there can be none."""
    if not runnable_sets(CPU_TARGETS) or cpu_obstacle(checkpoint.spec, dtype) is not None:
        return None
    try:
        return built_library(kept, choose_set(CPU_TARGETS))
    except BuildError as error:
        click.echo(f"note: {error}; the checkpoint is read by torch, which is slower", err=True)
        return None
