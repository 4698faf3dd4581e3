"""A package opened as a command line asks for it, and what is told of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moac_runtime.engine.engine import Engine
from moac_runtime.engine.memory import KEPT_BYTES, KV_BYTES
from moac_runtime.engine.model import Model, load
from moac_runtime.errors import UsageError
from moac_runtime.serve.served import Served


def open_served(options: argparse.Namespace, keys: Sequence[str] = ()) -> Served:
    """The package behind an engine, as `command.parser` reads its options. Raises MoacError."""
    model = load(
        options.package, backend=options.backend, dtype=options.dtype, threads=options.threads
    )
    if options.context is not None and options.context > model.capacity:
        raise UsageError(
            f"--context is {options.context}, and this package opens at most {model.capacity} "
            "tokens; give less, or compile it for more"
        )
    name = options.served_model_name or options.package.resolve().name
    return Served(model, _engine(model, options), name, keys)


def _engine(model: Model, options: argparse.Namespace) -> Engine:
    engine = model.engine(
        context=options.context,
        kv_bytes=options.max_kv_bytes,
        kept_bytes=0 if options.no_kept_caches else options.kept_bytes or KEPT_BYTES,
        rows=options.max_batch,
        waiting=options.max_queue,
        fixed_capacity=options.fixed_capacity,
    )
    if engine.memory.limit is None and not engine.session.fixed_batch:
        engine.memory.limit = KV_BYTES
    engine.memory.check(min(512, engine.limits.context))
    return engine


def told(served: Served) -> list[str]:
    """What runs, a line each, for people."""
    model, limits = served.model, served.engine.limits
    kernels = "" if model.kernels is None else f" ({model.kernels})"
    lines = [
        f"{served.name}: {model.backend}{kernels} {model.dtype}, at most {limits.context} tokens "
        f"a sequence, sampling {model.sampling().told()}"
    ]
    if served.engine.session.fixed_batch:
        lines.append(
            f"note: {model.backend} runs fixed batches, so requests wait for those that run"
        )
    if model.note is not None:
        lines.append(f"note: {model.note}")
    return lines
