"""What a compile is asked for, checked before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from moac.calibration import read_calibration
from moac.effort import EFFORTS, STANDARD, Effort
from moac.goal import Budget, Goal, goal_of
from moac.packaging.cpu_kernels import CPU_NAMES
from moac.packaging.kernels import CUDA_TARGETS
from moac.packaging.writer import DEFAULT_SHARD_SIZE
from moac.typed import Default, check_seed, check_types
from moac_runtime.errors import UsageError
from moac_runtime.package.dtypes import DTYPES
from moac_runtime.package.weight_formats import WEIGHTS

TARGETS = ("torch", "onnx", *CPU_NAMES, *CUDA_TARGETS)
ONNX_DTYPES = ("float32", "float16")
ONNX_WEIGHTS = ("shared", "int8")

# The choices that decide a plan; the others decide how it is packaged.
PLANNING = (
    *("budget", "max_kv_bytes", "batch", "length", "max_loss", "lengths", "rules_per_layer"),
    "kv_bits",
    *("calibration", "effort", "samples", "sink", "block", "min_span", "plans", "seed"),
)


FULL = "full"
KV_WIDTHS: Mapping[str, tuple[int | None, ...]] = {
    FULL: (None,),
    "8": (8,),
    "4": (4,),
    "auto": (None, 8, 4),
}
"""What may be asked for of keys and values: the widths that a head may have."""


def check_width_targets(what: str, targets: Sequence[str] | None) -> None:
    """Raise UsageError for targets that hold keys and values in the package's dtype alone."""
    others = sorted({name.partition(":")[0] for name in targets or ()} - {"torch", "cpu"})
    if others:
        raise UsageError(
            f"{what} and the target {others[0]} do not go together yet: its caches are of the "
            f"package's dtype; leave {others[0]} out of --target, or take --kv-bits full"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileRequest:
    """Every choice of a compile. Lengths, spans and blocks in tokens, sizes in bytes.

    How much KV memory may stay is one of three: `budget`, a share of the dense model's (a half);
    `max_kv_bytes`, for a session of `batch` sequences (1) of `length` tokens (the capacity); or
    `max_loss`, the predicted increase of loss in nats a token that may not be passed.
    `effort`: how much is measured, "quick", "standard" (None) or "thorough"; it decides `samples`,
    `plans` and, of `lengths`, how many and how long, where these are None.
    `kv_bits`: the width of keys and values, "full" (None) as `dtype` says, "8" or "4" for all
    heads, or "auto", any of them for each head as planned.
    `weights`: "full", as `dtype` says, "int8", the matrices in 8 bits, or "int4", those of the
    layers in 4 bits.
    None means: derived from the checkpoint; of `targets`, torch and, where this host can build it
    for the model, cpu. `onnx_dtype`: what the ONNX graph computes in, None
    the package's dtype, or float32 for bfloat16. `onnx_weights`: "shared" reads the package's own
    files, "int8" writes the linear weights in 8 bits. Raises UsageError for values that cannot be
    meant.
    """

    budget: float | None = None
    max_kv_bytes: int | None = None
    batch: int | None = None
    length: int | None = None
    max_loss: float | None = None
    lengths: tuple[int, ...] | None = None
    capacity: int | None = None
    dtype: str | None = None
    weights: str = "full"
    targets: tuple[str, ...] | None = None
    onnx_dtype: str | None = None
    onnx_weights: str = "shared"
    rules_per_layer: int | None = None
    kv_bits: str | None = None
    calibration: Path | None = None
    sink: int = Default(64)
    block: int = Default(64)
    min_span: int = Default(128)
    effort: str | None = None
    plans: int | None = None
    samples: int | None = None
    seed: int = Default(0)
    max_shard_size: int = DEFAULT_SHARD_SIZE
    revision: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        _ = self.goal  # it is refused now where it cannot be meant
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise UsageError("lengths must be positive numbers of tokens, such as 1024,2048")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"there is no dtype {self.dtype!r}; choose from {', '.join(DTYPES)}")
        for target in self.targets or ():
            if target not in TARGETS:
                raise UsageError(
                    f"there is no target {target!r}; choose from {', '.join(TARGETS)}"
                )
        self._check_weights()
        self._check_widths()
        self._check_onnx()
        if self.effort is not None and self.effort not in EFFORTS:
            raise UsageError(
                f"there is no effort {self.effort!r}; choose from {', '.join(EFFORTS)}"
            )
        for name in ("block", "plans", "samples", "max_shard_size"):
            found = getattr(self, name)
            if found is not None and found < 1:
                raise UsageError(
                    f"{name.replace('_', ' ')} is {getattr(self, name)}, expected at least 1"
                )
        check_seed(self.seed)
        self._check_spans()
        if self.calibration is not None:
            read_calibration(self.calibration)  # a bad line is named now, not after minutes

    @property
    def measuring(self) -> Effort:
        """What `effort` comes to, with `samples` and `plans` where they were given."""
        chosen = EFFORTS[self.effort or STANDARD]
        given = {"samples": self.samples, "plans": self.plans}
        return replace(chosen, **{name: n for name, n in given.items() if n is not None})

    @property
    def widths(self) -> tuple[int | None, ...]:
        """The widths that a head may have, None for the package's dtype."""
        return KV_WIDTHS[self.kv_bits or FULL]

    @property
    def goal(self) -> Goal:
        """How much KV memory may stay: a half where nothing says it."""
        return goal_of(
            budget=self.budget,
            max_kv_bytes=self.max_kv_bytes,
            batch=self.batch,
            length=self.length,
            max_loss=self.max_loss,
        )

    def to_json(self) -> dict[str, Any]:
        """Every choice as JSON values, the budget that holds where none was given among them.

        The user's own samples are told by their file's name and SHA-256, wherever it lies.
        """
        asked: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        asked["effort"] = self.effort or STANDARD
        asked |= {"samples": self.measuring.samples, "plans": self.measuring.plans}
        if self.calibration is not None:
            digest = hashlib.sha256(self.calibration.read_bytes()).hexdigest()
            asked["calibration"] = {"file": self.calibration.name, "sha256": digest}
        if self.widths == KV_WIDTHS[FULL]:
            del asked["kv_bits"]  # as in records from before there were others
        goal = self.goal
        return {**asked, "budget": goal.share if isinstance(goal, Budget) else None}

    def rounds_activations(self, dtype: str) -> bool:
        """Whether a target of a package in `dtype` multiplies activations in 8 bits."""
        return self.weights != "full" and (dtype == "bfloat16" or "onnx" in (self.targets or ()))

    def planning(self) -> dict[str, Any]:
        """The choices that decide a plan, as JSON values."""
        asked = self.to_json()
        return {name: asked[name] for name in PLANNING if name in asked}

    def planning_given(self) -> list[str]:
        """Which of them were given, be it as what they are by default."""
        left_out = (Default, NoneType)
        return [name for name in PLANNING if not isinstance(getattr(self, name), left_out)]

    def _check_weights(self) -> None:
        if self.weights not in WEIGHTS:
            raise UsageError(
                f"there are no weights {self.weights!r}; choose from {', '.join(WEIGHTS)}"
            )
        narrow = self.weights != "full"
        for option, found in (("weights", "int8"), ("dtype", "float16")):
            if narrow and getattr(self, f"onnx_{option}") == found:
                raise UsageError(
                    f"--weights {self.weights} and --onnx-{option} {found} do not go together: "
                    "the ONNX graph takes the package's own numbers and computes in float32; "
                    f"leave out --onnx-{option}"
                )

    def _check_widths(self) -> None:
        if self.kv_bits is not None and self.kv_bits not in KV_WIDTHS:
            raise UsageError(
                f"there are no kv bits {self.kv_bits!r}; choose from {', '.join(KV_WIDTHS)}"
            )
        if self.widths != KV_WIDTHS[FULL]:
            check_width_targets(f"--kv-bits {self.kv_bits}", self.targets)

    def _check_onnx(self) -> None:
        for name, choices, default in (
            ("onnx_dtype", ONNX_DTYPES, None),
            ("onnx_weights", ONNX_WEIGHTS, "shared"),
        ):
            found, option = getattr(self, name), name.replace("_", "-")
            if found not in (default, *choices):
                raise UsageError(f"--{option} is {found!r}, expected one of {', '.join(choices)}")
            if found != default and "onnx" not in (self.targets or ()):
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
