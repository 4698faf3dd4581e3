"""What the backend asks of the device beside kernels: memory, copies, a recorded step.

On the CPU, where kernels run interpreted, a step is simply run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated: what the device has free, and what torch keeps unused."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A table of the host on the device; nothing waits for the copy."""
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


def refill(target: Tensor, table: Tensor) -> None:
    """Overwrite a tensor of the device, in the order of its stream; nothing waits for the copy."""
    source = table if target.device.type == "cpu" else table.pin_memory()
    target.copy_(source, non_blocking=True)


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as a CUDA graph, which one call replays. It runs once before it is recorded."""
    if device.type == "cpu":
        return step
    stream = _recording_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()  # libraries set themselves up at their first call, which a graph cannot hold
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all steps: cuBLAS keeps a workspace for each that it has seen, for good."""
    return torch.cuda.Stream(device)
