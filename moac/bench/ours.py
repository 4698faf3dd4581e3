"""Our runtime under any plan: the package's own, one that drops nothing, a uniform one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from moac.bench.floor import weight_bytes_read
from moac.bench.system import Subject
from moac.packaging.fuse import head_order
from moac_kernels.cpu_build import build_cpu
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.library import choose_set, open_library, products
from moac_runtime.backends.cpu.opening import CpuModel
from moac_runtime.backends.open import open_backend
from moac_runtime.backends.session import Backend, Feed, Session
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.opening import TorchModel
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.weight_formats import WEIGHTS
from moac_runtime.package.weights import expected_tensors, load_weights


class OurSystem:
    """A session of our runtime; see `System`."""

    compiles_prefill = False

    def __init__(self, subject: Subject) -> None:
        self._backend, self._plan = _BACKENDS[subject.backend](subject), subject.plan
        self.dtype = self._backend.dtype
        self.kv_itemsize = DTYPE_BYTES[self.dtype]
        self.weight_bytes = weight_bytes_read(
            subject.spec, self.kv_itemsize, weights=_read_as(subject)
        )
        self._session: Session
        self._rows: list[int] = []
        self._next: list[int] = []

    def open(self, batch: int, capacity: int) -> None:
        self._session = self._backend.session(self._plan)
        self._rows = [self._session.admit(capacity) for _ in range(batch)]

    def prefill(self, tokens: list[list[int]]) -> None:
        self._feed(tokens)

    def step(self) -> None:
        self._feed([[token] for token in self._next])

    def kv_bytes(self) -> int:
        return self._session.kv_bytes()

    def _feed(self, tokens: list[list[int]]) -> None:
        logits = self._session.step(list(map(Feed, self._rows, tokens)))
        self._next = logits.argmax(-1).tolist()


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


def _read_as(subject: Subject) -> str:
    """How steps read weights: but for cpu, backends multiply narrow ones out when they load."""
    if subject.backend != "cpu" or subject.package is None:
        return "full"
    stored = open_artifact(subject.package, check="sizes").weights
    return stored if stored in WEIGHTS else "full"


def _torch(subject: Subject) -> Backend:
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
    return TorchModel(decoder, subject.plan, order)


def _cpu(subject: Subject) -> Backend:
    if subject.package is None:
        return _shape_model(subject)
    artifact = open_artifact(subject.package, check="sizes")
    return open_backend(
        artifact, "cpu", dtype=subject.dtype, threads=subject.threads, cpu=subject.cpu
    )


def _shape_model(subject: Subject) -> CpuModel:
    """Random weights under the kernels asked for or the best, built for the occasion."""
    best = choose_set(["cpu"], subject.cpu)
    with TemporaryDirectory() as folder:
        build_cpu(Path(folder), [best])
        library = open_library(Path(folder, f"{best}.so"))
    dtype: torch.dtype = getattr(torch, subject.dtype)
    weights = random_weights(subject.spec, dtype=dtype, device="cpu", seed=subject.seed)
    addresses = {name: weight.data_ptr() for name, weight in weights.items()}
    engine = CpuEngine(
        library,
        subject.spec,
        addresses,
        dtype=subject.dtype,
        threads=subject.threads,
        memory=weights,
    )
    order = head_order(subject.plan)
    return CpuModel(engine, subject.plan, order, best, products(best, subject.dtype))


def _cuda(subject: Subject) -> Backend:
    from moac.bench.cuda import open_subject

    weights = None
    if subject.package is None:
        dtype: torch.dtype = getattr(torch, subject.dtype)
        weights = random_weights(
            subject.spec, dtype=dtype, device=subject.device, seed=subject.seed
        )
    return open_subject(subject, weights)


def _onnx(subject: Subject) -> Backend:
    # a shape has no graph: the request refuses it
    artifact = open_artifact(subject.package or "", check="sizes")
    return open_backend(artifact, "onnx", threads=subject.threads)


_BACKENDS: dict[str, Callable[[Subject], Backend]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "onnx": _onnx,
    "torch": _torch,
}
