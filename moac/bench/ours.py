"""Our runtime under any plan: the package's own, one that drops nothing, a uniform one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from moac.bench.floor import weight_bytes_read
from moac.bench.system import Subject
from moac.packaging.fuse import head_order
from moac_kernels.cpu_build import build_cpu
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.library import open_library, runnable_sets
from moac_runtime.backends.cpu.opening import open_cpu
from moac_runtime.backends.cpu.session import CpuSession
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import Session
from moac_runtime.engine.batch import OpenSession
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.span import head_span
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.weights import expected_tensors, load_weights

Opener = Callable[[int, int], OpenSession]


class OurSystem:
    """A session of our runtime; see `System`."""

    compiles_prefill = False

    def __init__(self, subject: Subject) -> None:
        self.dtype, self._open = _BACKENDS[subject.backend](subject)
        self.kv_itemsize = DTYPE_BYTES[self.dtype]
        self.weight_bytes = weight_bytes_read(
            subject.spec, self.kv_itemsize, int8=_reads_int8(subject)
        )
        self._session: OpenSession
        self._next: Any = None

    def open(self, batch: int, capacity: int) -> None:
        self._session = self._open(batch, capacity)

    def prefill(self, tokens: list[list[int]]) -> None:
        self._next = self._session.extend(tokens).argmax(-1)

    def step(self) -> None:
        self._next = self._session.decode(self._next).argmax(-1)

    def kv_bytes(self) -> int:
        return self._session.kv_bytes()


def random_weights(
    spec: ModelSpec, *, dtype: torch.dtype, device: str, seed: int
) -> dict[str, Tensor]:
    """A package's weights by name, random numbers made in place; norms multiply by one."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in expected_tensors(spec).items():
        weight = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            weights[name] = weight.fill_(0 if spec.norm.plus_one else 1)
        else:
            weights[name] = weight.normal_(0, 0.02, generator=generator)
    return weights


def _reads_int8(subject: Subject) -> bool:
    """Whether steps read 8-bit weights: the other backends multiply them out when they load."""
    if subject.backend != "cpu" or subject.package is None:
        return False
    return open_artifact(subject.package, check="sizes").weights == "int8"


def _torch(subject: Subject) -> tuple[str, Opener]:
    dtype: torch.dtype = getattr(torch, subject.dtype)
    if subject.package is None:
        order = head_order(subject.plan)
        weights = random_weights(
            subject.spec, dtype=dtype, device=subject.device, seed=subject.seed
        )
    else:
        artifact = open_artifact(subject.package, check="sizes")
        order, weights = artifact.head_order, load_weights(artifact, dtype)
    decoder = Decoder(subject.spec, weights, dtype=dtype, device=subject.device)

    def open_session(batch: int, capacity: int) -> OpenSession:
        return Session(decoder, subject.plan, order, batch=batch, capacity=capacity)

    return subject.dtype, open_session


def _cpu(subject: Subject) -> tuple[str, Opener]:
    if subject.package is None:
        engine, order = _shape_engine(subject), head_order(subject.plan)
    else:
        artifact = open_artifact(subject.package, check="sizes")
        model = open_cpu(artifact, dtype=subject.dtype, threads=subject.threads)
        engine, order = model.engine, artifact.head_order

    def open_session(batch: int, capacity: int) -> OpenSession:
        return CpuSession(engine, subject.plan, order, batch=batch, capacity=capacity)

    return subject.dtype, open_session


def _shape_engine(subject: Subject) -> CpuEngine:
    """Random weights under the best kernels for this processor, built for the occasion."""
    best = runnable_sets(["cpu"])[0]
    with TemporaryDirectory() as folder:
        build_cpu(Path(folder), [best])
        library = open_library(Path(folder, f"{best}.so"))
    dtype: torch.dtype = getattr(torch, subject.dtype)
    weights = random_weights(subject.spec, dtype=dtype, device="cpu", seed=subject.seed)
    addresses = {name: weight.data_ptr() for name, weight in weights.items()}
    return CpuEngine(
        library,
        subject.spec,
        addresses,
        dtype=subject.dtype,
        threads=subject.threads,
        memory=weights,
    )


def _cuda(subject: Subject) -> tuple[str, Opener]:
    from moac.bench.cuda import open_subject

    weights = None
    if subject.package is None:
        dtype: torch.dtype = getattr(torch, subject.dtype)
        weights = random_weights(
            subject.spec, dtype=dtype, device=subject.device, seed=subject.seed
        )
    model = open_subject(subject, weights)
    return subject.dtype, partial(model.session, plan=subject.plan)


def _onnx(subject: Subject) -> tuple[str, Opener]:
    from moac_runtime.backends.onnx.session import OnnxSession, open_graph

    # a shape has no graph: the request refuses it
    artifact = open_artifact(subject.package or "", check="sizes")
    graph, plan = open_graph(artifact, threads=subject.threads), subject.plan

    def open_session(batch: int, capacity: int) -> OpenSession:
        if plan == artifact.plan:
            return OnnxSession(graph, batch=batch, capacity=capacity)
        spans = [
            head_span(
                plan.rules[0][0],  # the other plans have one rule
                capacity,
                sink=plan.sink,
                block=plan.block,
                min_span=plan.min_span,
                window=kind.window,
            )
            for kind in graph.layout.spans
        ]
        return OnnxSession(graph, batch=batch, capacity=capacity, spans=spans)

    return graph.layout.dtype, open_session


_BACKENDS: dict[str, Callable[[Subject], tuple[str, Opener]]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "onnx": _onnx,
    "torch": _torch,
}
