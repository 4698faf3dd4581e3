"""The machine a benchmark ran on: what it is, how fast it reads, what a process held."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moac.host import cpu_name
from moac_runtime.engine.stats import peak_memory_bytes

_BUFFER_BYTES = 1 << 29  # far more than any cache holds
_READS = 20  # the best of them counts: others may be at work
_VERSIONS = ("moac", "torch", "transformers", "triton", "onnxruntime", "llama-cpp-python")


def read_bandwidth_gbs(device: str, *, buffer_bytes: int = _BUFFER_BYTES) -> float:
    """Bandwidth of `device` in 10^9 bytes a second: the best of some passes over a large buffer.

    On a CPU a sum over it, by all threads of torch; on a GPU a copy, reads and writes counted.
    """
    source = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source) if device == "cuda" else None
    best = float("inf")
    for _ in range(_READS):
        started = time.perf_counter()
        if target is None:
            source.sum()
        else:
            target.copy_(source)
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return (1 if target is None else 2) * buffer_bytes / best / 1e9


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, threads in use, memory and, where it is the device, the GPU."""
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Of Python and of every installed library that a system may run on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_bytes(device: str) -> int | None:
    """The most memory this process held, on the GPU where that is the device.

    On Linux the process's own high-water mark: `getrusage` would count its parent's as well.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory_bytes()
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
