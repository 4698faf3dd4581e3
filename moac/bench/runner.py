"""The benchmark: for every batch and context, all systems in turns, medians and spread.

Systems alternate in blocks of a few steps (A B C A B C ...), so that what else the machine does
falls on all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product

import click
import torch

from moac.bench.availability import check_available, runnable
from moac.bench.machine import machine, read_bandwidth_gbs
from moac.bench.memory import check_memory
from moac.bench.plans import random_plan, system_plan
from moac.bench.request import BenchRequest
from moac.bench.result import BenchResult, BenchRow, Times, measured_row
from moac.bench.shapes import shape_spec
from moac.bench.system import Subject
from moac.bench.worker import Load, Worker
from moac.origin import check_source
from moac.progress.progress import stage, step
from moac_runtime.backends.cpu.engine import obstacle
from moac_runtime.backends.cpu.library import choose_set
from moac_runtime.backends.open import choose_backend
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.host.cores import set_torch_threads
from moac_runtime.package.artifact import Artifact, open_artifact
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.trust import TRUST_IT, UNTRUSTED

_BLOCK_STEPS = 8
_PREFILL, _DECODE = "prefill", "decode"


def run_bench(request: BenchRequest) -> BenchResult:
    """Measure everything that `request` asks for.

    Raises UsageError for a request that the model cannot serve and MoacError for a system that
    cannot run here, both before anything is timed, and MoacError where a system fails.
    """
    request = with_backend(request)
    model = _open_model(request)
    systems = choose_systems(request)
    click.echo(f"systems: {', '.join(systems)}", err=True)
    set_torch_threads(request.threads)
    with stage("bandwidth"):
        bandwidth = read_bandwidth_gbs(request.device)
    if request.device == "cuda":
        torch.cuda.empty_cache()  # the memory is for the processes that are measured
    rows: list[BenchRow] = []
    for batch, context in product(request.batches, request.contexts):
        rows.extend(_measure(request, model, systems, batch, context, bandwidth))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return BenchResult(machine(request.device), bandwidth, tuple(rows), date)


def with_backend(request: BenchRequest) -> BenchRequest:
    """The request with its backend settled: by default the one `moac run` would take here."""
    if request.backend is not None:
        return request
    if request.package is None:
        default = "cuda" if request.device == "cuda" else "torch"
        return replace(request, backend="cpu" if request.cpu else default)
    targets = open_artifact(request.package, check="sizes").runs
    if request.device == "cuda":
        kernels = any(target.partition(":")[0] == "cuda" for target in targets)
        return replace(request, backend="cuda" if kernels else "torch")
    on_cpu = [target for target in targets if target.partition(":")[0] != "cuda"]
    return replace(
        request, backend=choose_backend(None, on_cpu, dtype=request.dtype, cpu=request.cpu)
    )


def choose_systems(request: BenchRequest) -> tuple[str, ...]:
    """`moac` and what it is measured against: as asked, or all that can run here."""
    if request.against is None:
        return ("moac", *runnable(request))
    check_available(request)
    return tuple(dict.fromkeys(("moac", *request.against)))


@dataclass(frozen=True, slots=True)
class _Target:
    """What is measured. `plan(capacity)`: our own row's plan at a capacity."""

    spec: ModelSpec
    dtype: str
    plan: Callable[[int], Plan]


def _open_model(request: BenchRequest) -> _Target:
    if request.package is None:
        spec = shape_spec(request.shape or "")
        model = _Target(spec, request.dtype or "bfloat16", _random_plans(request, spec))
        if request.backend == "cpu":
            choose_set(["cpu"], request.cpu)
        limit = spec.context
    else:
        artifact = open_artifact(request.package)
        if request.backend in ("cpu", "cuda") and not artifact.trusted:
            raise MoacError(f"{UNTRUSTED}; {TRUST_IT}")
        if request.backend not in {target.partition(":")[0] for target in artifact.targets}:
            raise MoacError(
                f"{request.package} is built for {', '.join(artifact.targets)}, not for "
                f"{request.backend}; {_remedy(request.backend, artifact)}"
            )
        if request.backend == "cuda" and request.dtype not in (None, artifact.dtype):
            raise UsageError(
                f"the package's kernels compute in {artifact.dtype}, not in {request.dtype}; "
                "leave out --dtype"
            )
        if request.backend == "cpu":
            choose_set(artifact.targets, request.cpu)  # refused before anything is loaded
        _check_source(request, artifact)
        model = _Target(artifact.spec, request.dtype or artifact.dtype, lambda _: artifact.plan)
        limit = min(artifact.capacity, artifact.spec.context)
    longest = request.capacity(max(request.contexts))
    if longest > limit:
        raise UsageError(
            f"context {max(request.contexts)} and {request.tokens} tokens after it make "
            f"{longest}, but the model holds {limit}; measure a shorter context"
        )
    return model


def _remedy(backend: str | None, artifact: Artifact) -> str:
    """What to do about a backend that a package is not built for."""
    unserved = obstacle(artifact.spec, artifact.dtype) if backend == "cpu" else None
    if unserved is not None:
        return f"no CPU kernel serves this model ({unserved}), so leave out --backend cpu"
    return f"compile it with --target {backend}"


def _random_plans(request: BenchRequest, spec: ModelSpec) -> Callable[[int], Plan]:
    def plan(capacity: int) -> Plan:
        return random_plan(spec, density=request.density, capacity=capacity, seed=request.seed)

    return plan


def _check_source(request: BenchRequest, artifact: Artifact) -> None:
    if request.source is None:
        return
    from moac.checkpoint import open_checkpoint

    check_source(artifact, open_checkpoint(request.source))


def _measure(
    request: BenchRequest,
    model: _Target,
    systems: Sequence[str],
    batch: int,
    context: int,
    bandwidth: float,
) -> Iterator[BenchRow]:
    """The rows of one batch and context."""
    load = Load(batch, context, request.capacity(context), request.seed)
    plan, kv = model.plan(load.capacity), model.spec.kv_shape(DTYPE_BYTES[model.dtype])
    subjects = {
        name: _subject(request, model, system_plan(name, plan, load.capacity, kv))
        for name in systems
    }
    check_memory(subjects, load, sequential=request.sequential)
    groups = [[name] for name in systems] if request.sequential else [list(systems)]
    for group in groups:
        where = f"batch {batch}, context {context}: {', '.join(group)}"
        with ExitStack() as stack:
            with stage(f"load for {where}"):
                workers = [stack.enter_context(Worker(n, subjects[n], load)) for n in group]
            with stage(where, _amounts(len(group), request)):
                times = _alternate(workers, request)
            usages = [worker.usage() for worker in workers]
        for name, found, usage in zip(group, times, usages, strict=True):
            yield measured_row(name, load, subjects[name], found, usage, bandwidth)


def _subject(request: BenchRequest, model: _Target, plan: Plan) -> Subject:
    return Subject(
        spec=model.spec,
        plan=plan,
        dtype=model.dtype,
        device=request.device,
        backend=request.backend or "torch",
        cpu=request.cpu,
        package=request.package,
        source=request.source,
        shape=request.shape,
        gguf=request.gguf,
        threads=request.threads,
        seed=request.seed,
    )


def _amounts(systems: int, request: BenchRequest) -> dict[str, float]:
    """How many prefills and decode steps are timed; within a stage all are of one length."""
    rounds = systems * request.repeats
    return {_PREFILL: rounds, _DECODE: rounds * request.tokens}


def _alternate(workers: Sequence[Worker], request: BenchRequest) -> list[Times]:
    """Prefill each, then blocks of steps in turns; again for every repeat."""
    times = [Times() for _ in workers]
    for _ in range(request.repeats):
        for worker, found in zip(workers, times, strict=True):
            with step(_PREFILL, 1):
                found.prefill_s.append(worker.prefill())
        for start in range(0, request.tokens, _BLOCK_STEPS):
            steps = min(_BLOCK_STEPS, request.tokens - start)
            for worker, found in zip(workers, times, strict=True):
                with step(_DECODE, steps):
                    found.blocks.append(worker.decode(steps))
    return times
