"""What a benchmark is asked to measure, checked before anything is opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moac.typed import check_seed, check_types
from moac_runtime.backends.open import check_cpu
from moac_runtime.errors import UsageError
from moac_runtime.host.cores import MOST_THREADS
from moac_runtime.package.dtypes import DTYPE_BYTES

SYSTEMS = ("moac", "hf", "hf-static", "dense", "uniform", "flex", "llamacpp", "onnx")
BACKENDS = ("cpu", "cuda", "torch", "onnx")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One benchmark: every system at every batch and context, `tokens` decode steps each.

    The model is a `package`, or a `shape` (see `shapes.SHAPES`) with random weights and a random
    plan of `density`. `source`: the package's checkpoint, which hf, hf-static and flex run.
    `against`: systems beside `moac`, None for all that can run here. `context`: tokens prefilled;
    a session's capacity is context + tokens. `repeats`: whole measurements, each with its own
    prefill. `dtype`: None is the package's, bfloat16 for a shape. `backend`: of our own rows, None
    is the best of the package here, torch for a shape. `cpu`: the instruction set of the backend
    cpu, None is the best here. `threads`: None is every core this
    process may use. `sequential`: one system at a time, where all at once do not fit in memory.

    Raises UsageError where a value or a combination cannot be.
    """

    package: Path | None = None
    shape: str | None = None
    source: str | None = None
    against: tuple[str, ...] | None = None
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (256, 4096)
    tokens: int = 32
    repeats: int = 1
    dtype: str | None = None
    backend: str | None = None
    cpu: str | None = None
    device: str = "cpu"
    density: float = 0.5
    seed: int = 0
    threads: int | None = None
    gguf: Path | None = None
    sequential: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
        if (self.package is None) == (self.shape is None):
            raise UsageError("what to measure is a package or --shape NAME; give one of them")
        if self.shape is not None and self.source is not None:
            raise UsageError("--shape makes its own random weights; leave out --source")
        if self.shape is not None and self.backend == "onnx":
            raise UsageError("--shape has no ONNX graph; leave out --backend onnx")
        _check_choices("system", self.against or (), SYSTEMS)
        _check_choices("backend", (self.backend,) if self.backend else (), BACKENDS)
        _check_choices("device", (self.device,), DEVICES)
        check_cpu(self.cpu, self.backend)
        if self.cpu is not None and self.device != "cpu":
            raise UsageError("--cpu is for the backend cpu, which runs on the CPU; leave it out")
        if self.backend == "cuda" and self.device != "cuda":
            raise UsageError("the backend cuda runs on a GPU; give --device cuda as well")
        if self.backend in ("cpu", "onnx") and self.device != "cpu":
            raise UsageError(f"the backend {self.backend} runs on the CPU; leave out --device")
        if self.backend == "cpu" and self.dtype == "float16":
            raise UsageError(
                "the backend cpu computes in bfloat16 or float32; give one as --dtype"
            )
        _check_choices("dtype", (self.dtype,) if self.dtype else (), DTYPE_BYTES)
        for name, values in (("--batch", self.batches), ("--context", self.contexts)):
            _check_positive(name, values)
        _check_positive("--tokens", (self.tokens,))
        _check_positive("--repeats", (self.repeats,))
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UsageError(f"--threads must be 1 to {MOST_THREADS}, got {self.threads}")
        if not 0 < self.density <= 1:
            raise UsageError(f"--density must be above 0 and at most 1, got {self.density}")

    def capacity(self, context: int) -> int:
        """Tokens a session holds: the context and the tokens decoded after it."""
        return context + self.tokens


def _check_choices(kind: str, asked: Iterable[str], choices: Iterable[str]) -> None:
    known = tuple(choices)
    if unknown := next((name for name in asked if name not in known), None):
        raise UsageError(f"there is no {kind} {unknown!r}; choose from {', '.join(known)}")


def _check_positive(option: str, values: Iterable[int]) -> None:
    for value in values:
        if value < 1:
            raise UsageError(f"{option} must be 1 or more, got {value}")
