"""Whole models with random weights, each system at the largest batch that it can hold."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moac.bench.availability import obstacle
from moac.bench.floor import floor_ms, kv_bytes_read, weight_bytes_read
from moac.bench.open import open_system
from moac.bench.ours import random_weights
from moac.bench.plans import random_plan, system_plan
from moac.bench.request import BenchRequest
from moac.bench.shapes import shape_spec
from moac.bench.system import Subject, System
from moac.bench.worker import Load, Running
from moac.packaging.fuse import head_order
from moac_runtime.backends.cuda.decoder import CudaDecoder
from moac_runtime.backends.cuda.device import free_bytes
from moac_runtime.backends.cuda.memory import session_demand
from moac_runtime.backends.cuda.opening import CudaModel
from moac_runtime.backends.cuda.session import CudaSession
from moac_runtime.backends.session import Feed
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec
from on_gpu.attention import shape_of
from on_gpu.setting import OURS, Setting, attempted
from on_gpu.workshop import Workshop

_DENSITY = 0.5
_SEED = 0
_ROOM = 0.85  # of what is free, for a library that does not tell what it will take
_LEAST_LEFT = 60  # seconds that must be left for a system to start
_LEAST_LEFT_TO_COMPILE = 120


class _Ours:
    """Our runtime under a plan; see `moac.bench.system.System`."""

    compiles_prefill = False

    def __init__(self, model: CudaModel, plan: Plan) -> None:
        self._model, self._plan = model, plan
        self.dtype = str(model.decoder.dtype).removeprefix("torch.")
        self.kv_itemsize = DTYPE_BYTES[self.dtype]
        self.weight_bytes = weight_bytes_read(model.decoder.spec, self.kv_itemsize)
        self._session: CudaSession
        self._rows: list[int] = []
        self._next: list[int] = []

    def open(self, batch: int, capacity: int) -> None:
        # the old one's memory goes before a row of the new one asks for its own
        self._session = self._model.session(self._plan)
        self._rows = [self._session.admit(capacity) for _ in range(batch)]

    def prefill(self, tokens: list[list[int]]) -> None:
        logits = self._session.step(list(map(Feed, self._rows, tokens)))
        self._next = logits.argmax(-1).tolist()

    def step(self) -> None:
        self.prefill([[token] for token in self._next])

    def kv_bytes(self) -> int:
        return self._session.kv_bytes()


def step_rows(
    setting: Setting, workshop: Workshop, copy_gbs: float, without: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """A row for every shape, context and system; `{"left_out": why}` for what did not run."""
    for name, context, systems in setting.steps:
        for system in systems:
            what = f"step {name} {context} {system}"
            why = _obstacle(setting, name, system, without)
            if why is not None:
                yield {"what": what, "left_out": why}
                continue
            told = (workshop, name, context, system, copy_gbs)
            row = attempted(what, partial(_largest, setting, *told))
            yield {**row, "shape": name, "context": context, "system": system}


class _TooManyRows(Exception):
    """The device's memory did not suffice for so many `rows`."""

    def __init__(self, rows: int) -> None:
        self.rows = rows


def _largest(setting: Setting, *told: Any) -> dict[str, Any]:
    """What `_measure` finds with as many rows as it can; a library may need more than it tells.

    `out_of_memory`: the rows that were tried in vain.
    """
    rows, failed = setting.most_rows, []
    while rows:
        try:
            _release(setting)
            found = _measure(replace(setting, most_rows=rows), *told)
            return {**found, "out_of_memory": failed} if failed else found
        except _TooManyRows as error:
            failed.append(error.rows)
            rows = error.rows * 3 // 4
        except Exception as error:  # another library's, most likely; the other systems go on
            if told[3] in OURS:
                raise
            return {"left_out": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        finally:
            _release(setting)
    return {"left_out": "not even one row fits"}


def _release(setting: Setting) -> None:
    """Give back what nothing uses, so that what is free is what it seems."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def _obstacle(setting: Setting, name: str, system: str, without: tuple[str, ...]) -> str | None:
    if system in without:
        return "asked to be left out"
    compiled = system in ("hf-static", "hf-uniform")
    if setting.left() < (_LEAST_LEFT_TO_COMPILE if compiled else _LEAST_LEFT):
        return "no time was left"
    if system in OURS:
        return None
    asked = BenchRequest(shape=name, device=setting.device.type)
    return obstacle("hf" if system == "hf" else "hf-static", asked)


def _measure(
    setting: Setting, workshop: Workshop, name: str, context: int, system: str, copy_gbs: float
) -> dict[str, Any]:
    spec, capacity = shape_spec(name), context + setting.tokens
    dtype = shape_of(setting, name).dtype
    plan = random_plan(spec, density=_DENSITY, capacity=capacity, seed=_SEED)
    kv = spec.kv_shape(DTYPE_BYTES[dtype])
    held = system_plan(system.removeprefix("hf-"), plan, capacity, kv)
    if system == "hf-uniform":  # a static cache of a uniform plan's tokens, and no more
        context = max(held.head(0, 0, capacity).size - setting.tokens, 1)
        capacity = context + setting.tokens
    load, opened = _load(setting, workshop, spec, name, dtype, held, system, context, capacity)
    try:
        running = Running(opened, _subject(setting, spec, held, name, dtype), load)
        prefill_s = running.prefill()
        times = running.decode(setting.tokens)
    except torch.OutOfMemoryError:
        raise _TooManyRows(load.batch) from None
    kv_read = kv_bytes_read(
        spec,
        held,
        batch=load.batch,
        capacity=capacity,
        length=context + setting.tokens / 2,
        itemsize=DTYPE_BYTES[dtype],
    )
    median = statistics.median(times)
    floor = floor_ms(opened.weight_bytes + kv_read, copy_gbs)
    return {
        "batch": load.batch,
        "density": held.density(capacity),
        "prefill_s": prefill_s,
        "decode_ms_p50": median,
        "decode_ms_p95": sorted(times)[math.ceil(0.95 * len(times)) - 1],
        "tokens_per_s": load.batch * 1e3 / median,
        "weight_bytes": opened.weight_bytes,
        "kv_bytes": running.usage().kv_bytes,
        "floor_ms": floor,
        "of_bandwidth": floor / median,
    }


def _load(
    setting: Setting,
    workshop: Workshop,
    spec: ModelSpec,
    name: str,
    dtype: str,
    held: Plan,
    system: str,
    context: int,
    capacity: int,
) -> tuple[Load, System]:
    """The system with its weights, and the largest load that fits beside them."""
    subject = _subject(setting, spec, held, name, dtype)
    if system in OURS:
        opened: System = _Ours(_model(setting, workshop, spec, name, held), held)
        share = 1.0  # it tells what it takes
    else:
        opened = open_system("hf" if system == "hf" else "hf-static", subject)
        share = _ROOM
    demand = session_demand(spec, held, capacity, itemsize=DTYPE_BYTES[dtype])
    fits = demand.fitting(int(share * free_bytes(setting.device)))
    batch = min(max(fits, 1), setting.most_rows)
    return Load(batch, context, capacity, _SEED), opened


def _model(
    setting: Setting, workshop: Workshop, spec: ModelSpec, name: str, plan: Plan
) -> CudaModel:
    shape = shape_of(setting, name)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    weights = random_weights(spec, dtype=dtype, device=setting.device.type, seed=_SEED)
    kernels = workshop.load(shape)
    decoder = CudaDecoder(spec, weights, kernels, dtype=dtype, device=setting.device)
    return CudaModel(decoder, plan, head_order(plan), workshop.tables(shape))


def _subject(setting: Setting, spec: ModelSpec, plan: Plan, name: str, dtype: str) -> Subject:
    return Subject(
        spec=spec,
        plan=plan,
        dtype=dtype,
        device=setting.device.type,
        backend="cuda",
        package=None,
        source=None,
        shape=name,
        gguf=None,
        threads=None,
        seed=_SEED,
    )
