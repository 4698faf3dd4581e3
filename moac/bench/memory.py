"""Whether the systems of a benchmark fit into memory, told before one of them is started."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from moac.bench.system import Subject
from moac.bench.worker import Load
from moac.host import memory_bytes
from moac_runtime.errors import MoacError
from moac_runtime.host.cgroup import memory_limit
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.weights import expected_tensors

_GIB = 2**30


def check_memory(systems: Mapping[str, Subject], load: Load, *, sequential: bool) -> None:
    """Raises MoacError where `systems` need more memory than there is, telling what to change.

    What is counted is what they cannot do without, weights and caches: more will be needed.
    """
    device = next(iter(systems.values())).device
    free = available_bytes(device)
    if free is None:
        return
    needs = {name: least_bytes(name, subject, load) for name, subject in systems.items()}
    largest = max(needs, key=needs.__getitem__)
    smaller = "measure a smaller --batch, --context or --shape"
    if needs[largest] > free:
        raise MoacError(_sentence([largest], needs[largest], free, smaller))
    together = sum(needs.values())
    if not sequential and together > free:
        raise MoacError(_sentence(list(needs), together, free, "give --sequential"))


def least_bytes(name: str, subject: Subject, load: Load) -> int:
    """Bytes of weights and caches that the process of a system holds at least."""
    itemsize = DTYPE_BYTES[subject.dtype]
    held = subject.plan.held_bytes(load.capacity, subject.spec.kv_shape(itemsize))
    return load.batch * held + _weight_bytes(name, subject, itemsize)


def available_bytes(device: str) -> int | None:
    """Bytes that processes can still allocate, None where the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    bounds = (memory_bytes("MemAvailable"), memory_limit())
    return min((bound for bound in bounds if bound is not None), default=None)


def _weight_bytes(name: str, subject: Subject, itemsize: int) -> int:
    ours = name in ("moac", "dense", "uniform", "onnx")
    mapped = subject.package is not None and subject.backend in ("cpu", "onnx")
    if name == "llamacpp" or (ours and mapped):
        return 0  # a file that processes share and the system may put aside
    return itemsize * sum(map(math.prod, expected_tensors(subject.spec).values()))


def _sentence(names: Sequence[str], needed: int, free: int, remedy: str) -> str:
    together = " together" if len(names) > 1 else ""
    verb = "need" if len(names) > 1 else "needs"
    return (
        f"{', '.join(names)}{together} {verb} at least {needed / _GIB:.1f} GiB for weights and "
        f"caches, {free / _GIB:.1f} free: {remedy}"
    )
