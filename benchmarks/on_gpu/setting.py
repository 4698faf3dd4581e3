"""Where a run takes place and how large it is: on a GPU, or rehearsed on the CPU."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_TRIALS = 5

OURS = ("moac", "dense", "uniform")
QUICK = (*OURS, "hf")
SYSTEMS = (*QUICK, "hf-static", "hf-uniform")  # the last two compile for a minute each


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """`interpret`: kernels run in Triton's interpreter, on CPU tensors.

    `cases`: of random correctness. `hidden`, `layers`: of the small models. `attention`: shape,
    batch and tokens of each decode call. `prefill`: shape and tokens. `steps`: shape, context and
    systems, each for `tokens` steps of decode. `most_rows`: of a batch.
    """

    device: torch.device
    interpret: bool
    ends: float
    cases: int
    hidden: int
    layers: int
    attention: tuple[tuple[str, int, int], ...]
    prefill: tuple[tuple[str, int], ...]
    steps: tuple[tuple[str, int, tuple[str, ...]], ...]
    tokens: int
    most_rows: int
    buffer_bytes: int

    def left(self) -> float:
        """Seconds until the run should end."""
        return self.ends - time.monotonic()


def on_gpu(device: torch.device, seconds: float) -> Setting:
    """The whole measurement."""
    return Setting(
        device=device,
        interpret=False,
        ends=time.monotonic() + seconds,
        cases=100,
        hidden=256,
        layers=4,
        attention=(
            ("llama3-8b", 1, 32768),
            ("llama3-8b", 8, 8192),
            ("llama3-8b", 16, 16384),
            ("vicuna-7b", 1, 8192),
            ("vicuna-7b", 8, 4096),
        ),
        prefill=(("llama3-8b", 4096), ("llama3-8b", 16384), ("llama3-8b", 32768)),
        steps=(
            ("vicuna-7b", 16384, SYSTEMS),
            ("vicuna-7b", 4096, SYSTEMS),
            ("vicuna-7b", 8192, QUICK),
            ("llama3-8b", 16384, QUICK),
        ),
        tokens=64,
        most_rows=64,
        buffer_bytes=1 << 30,
    )


def rehearsal(device: torch.device, seconds: float) -> Setting:
    """Every path of the script on tiny sizes; its times mean nothing."""
    return Setting(
        device=device,
        interpret=True,
        ends=time.monotonic() + seconds,
        cases=3,
        hidden=64,
        layers=1,
        attention=(("tiny", 1, 160), ("tiny", 2, 96)),
        prefill=(("tiny", 200),),
        steps=(("tiny", 200, SYSTEMS),),  # longer than the smallest span, so that tokens drop
        tokens=2,
        most_rows=2,
        buffer_bytes=1 << 22,
    )


def attempted(what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row of what `measure` tells, or of why it failed: what comes after may still run."""
    try:
        return {"what": what, **measure()}
    except Exception as error:
        traceback.print_exc()
        return {"what": what, "failed": 1, "said": f"{type(error).__name__}: {error}"}


def seconds(setting: Setting, work: Callable[[], None], *, calls: int = 1) -> float:
    """The median time of `work`, which queues `calls` equal calls, for one of them.

    On a GPU the work is recorded once and replayed, so that the host's own time is not measured.
    """
    if setting.device.type == "cpu":
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) / calls
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times = []
    for _ in range(_TRIALS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / calls
