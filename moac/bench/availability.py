"""Which systems can run here; one asked for by name is never left out in silence."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import torch

from moac.bench.request import SYSTEMS, BenchRequest
from moac_kernels.cpu_build import build_obstacle
from moac_runtime.backends.cpu.library import runnable_sets
from moac_runtime.backends.cuda.source import can_build
from moac_runtime.errors import MoacError
from moac_runtime.host.extras import missing
from moac_runtime.package.artifact import open_artifact

_OURS = ("moac", "dense", "uniform")


def runnable(request: BenchRequest) -> tuple[str, ...]:
    """Every system beside `moac` that can run here. Raises MoacError where ours cannot."""
    _check_device(request)
    others = (name for name in SYSTEMS if name != "moac")
    return tuple(name for name in others if obstacle(name, request) is None)


def check_available(request: BenchRequest) -> None:
    """Raises MoacError for the first system asked for by name that cannot run here."""
    _check_device(request)
    for name in request.against or ():
        reason = obstacle(name, request)
        if reason is not None:
            raise MoacError(f"{name} cannot run here: {reason}")


def obstacle(name: str, request: BenchRequest) -> str | None:
    """Why the system `name` cannot run here and what to do, None where it can."""
    if name in _OURS:
        return None
    if name == "llamacpp":
        return _llamacpp_obstacle(request)
    if name == "onnx":
        return _onnx_obstacle(request)
    if find_spec("transformers") is None:
        return f"it needs {missing('transformers')}"
    if request.source is None and request.shape is None:
        return "it runs the original model; give its checkpoint with --source"
    return None if name == "hf" else _compiler_obstacle(request.device)


def _check_device(request: BenchRequest) -> None:
    if request.device == "cuda" and not torch.cuda.is_available():
        raise MoacError("there is no GPU that torch can use here; leave out --device cuda")
    if request.shape is not None and request.backend == "cpu":
        _check_cpu_build()


def _check_cpu_build() -> None:
    """A shape's CPU kernels are built on the spot."""
    reason = build_obstacle()
    if reason is None and not runnable_sets(["cpu"]):
        reason = "this processor has none of the instruction sets that CPU kernels are built for"
    if reason is not None:
        raise MoacError(f"{reason}; leave out --backend cpu")


def _llamacpp_obstacle(request: BenchRequest) -> str | None:
    if request.device != "cpu":
        return "it is measured on the CPU alone; leave out --device"
    if find_spec("llama_cpp") is None:
        return "it needs llama-cpp-python; run: pip install llama-cpp-python"
    if request.gguf is None:
        return "it needs the same model as a GGUF; give one with --gguf FILE"
    if not request.gguf.is_file():
        return f"there is no file {request.gguf}; give the model as a GGUF with --gguf FILE"
    return None


def _onnx_obstacle(request: BenchRequest) -> str | None:
    if request.device != "cpu":
        return "it runs on the CPU; leave out --device"
    if find_spec("onnxruntime") is None:
        return f"it needs {missing('onnxruntime')}"
    if request.package is None:
        return "a shape has no ONNX graph; give a package"
    if "onnx" not in open_artifact(request.package, check="sizes").targets:
        return "the package has no ONNX graph; compile it with --target onnx"
    return None


def _compiler_obstacle(device: str) -> str | None:
    """What torch.compile lacks."""
    if device == "cuda":
        if can_build():
            return None
        return "torch.compile needs triton, a C compiler and Python's headers; install them"
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        return "torch.compile needs a C++ compiler; install g++"
    return None
