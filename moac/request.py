"""What a compile is asked for, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moac.calibration import read_calibration
from moac.packaging.kernels import CUDA_TARGETS
from moac.packaging.writer import DEFAULT_SHARD_SIZE
from moac_runtime.errors import UsageError
from moac_runtime.manifest import DTYPES

TARGETS = ("torch", "onnx", *CUDA_TARGETS)
ONNX_DTYPES = ("float32", "float16")
ONNX_WEIGHTS = ("shared", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileRequest:
    """Every choice of a compile. Lengths, spans and blocks in tokens, sizes in bytes.

    None means: derived from the checkpoint. `onnx_dtype`: what the ONNX graph computes in, None
    the package's dtype, or float32 for bfloat16. `onnx_weights`: "shared" reads the package's own
    files, "int8" writes the linear weights in 8 bits. Raises UsageError for values that cannot be
    meant.
    """

    budget: float = 0.5
    lengths: tuple[int, ...] | None = None
    capacity: int | None = None
    dtype: str | None = None
    targets: tuple[str, ...] = ("torch",)
    onnx_dtype: str | None = None
    onnx_weights: str = "shared"
    rules_per_layer: int | None = None
    calibration: Path | None = None
    sink: int = 64
    block: int = 64
    min_span: int = 128
    plans: int = 5
    samples: int = 5
    seed: int = 0
    max_shard_size: int = DEFAULT_SHARD_SIZE
    revision: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise UsageError(
                f"the budget is {self.budget:g}, expected above 0 and at most 1: the share of "
                "the dense model's KV memory that may stay"
            )
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise UsageError("lengths must be positive numbers of tokens, such as 1024,2048")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"there is no dtype {self.dtype!r}; choose from {', '.join(DTYPES)}")
        for target in self.targets:
            if target not in TARGETS:
                raise UsageError(
                    f"there is no target {target!r}; choose from {', '.join(TARGETS)}"
                )
        self._check_onnx()
        for name in ("block", "plans", "samples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected at least 1")
        self._check_spans()
        if self.calibration is not None:
            read_calibration(self.calibration)  # a bad line is named now, not after minutes

    def _check_onnx(self) -> None:
        for name, choices, default in (
            ("onnx_dtype", ONNX_DTYPES, None),
            ("onnx_weights", ONNX_WEIGHTS, "shared"),
        ):
            found, option = getattr(self, name), name.replace("_", "-")
            if found not in (default, *choices):
                raise UsageError(f"--{option} is {found!r}, expected one of {', '.join(choices)}")
            if found != default and "onnx" not in self.targets:
                raise UsageError(f"--{option} is for the onnx target; add onnx to --target")

    def _check_spans(self) -> None:
        if self.sink < 0 or self.sink % self.block or self.min_span % self.block:
            raise UsageError(
                f"sink {self.sink} and min span {self.min_span} must be multiples of the block "
                f"of {self.block} tokens"
            )
        if self.min_span <= self.sink:
            raise UsageError(
                f"the smallest span of {self.min_span} tokens must exceed the sink of "
                f"{self.sink}; give a larger --min-span"
            )
        if self.rules_per_layer is not None and self.rules_per_layer < 1:
            raise UsageError(f"rules per layer is {self.rules_per_layer}, expected at least 1")
