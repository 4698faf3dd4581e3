"""`--dry-run`: the stages of a compile or a plan with their time and memory, guessed ahead.

Time is floating-point operations over a rate measured here in half a second, so it is right to a
factor of two at best; memory counts every copy of the weights that a stage holds, and activations.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moac.calibration import DOMAINS, TEXT_TOKENS
from moac.checkpoint import Checkpoint, open_checkpoint
from moac.lengths import Lengths
from moac.loss_model import LADDER_PLANS
from moac.packaging.staging import check_target
from moac.plan_file import check_plan_target, read_plan_file
from moac.planner import check_packaging, measuring_dtype, prepare, sample_counts
from moac.profiling.influence import ACTIVATION_BYTES_LIMIT, backward_bytes, tile_bytes
from moac.request import CompileRequest
from moac.stages import DRAFTS, VALIDATION_SAMPLES
from moac.workspace import pick_device
from moac_runtime.generation import DTYPE_BYTES
from moac_runtime.spec import ModelSpec

_LIBRARIES_BYTES = 450 << 20
_COPIES = 2  # the dense model in transformers, and the same weights as our runtime has them
_ANSWER_TOKENS = 70  # that the dense model writes for one sample, about
_DECODE_SECONDS_PER_BYTE = 1 / 1e10  # decoding reads the weights once a token
_SOLVE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage: what it does, wall seconds and peak bytes."""

    name: str
    work: str
    seconds: float
    memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def estimate(
    source: str, out: Path, request: CompileRequest, *, force: bool, plan: Path | None = None
) -> list[StageEstimate]:
    """What `compile_model` with these arguments would do; raises as it would before any work."""
    check_target(out, force=force)
    checkpoint = open_checkpoint(source, revision=request.revision)
    if plan is None:
        lengths, _ = prepare(checkpoint, request)
        planning = _planning(checkpoint, request, lengths)
    else:
        lengths, _ = read_plan_file(plan, checkpoint, request).prepared()
        planning = []
    check_packaging(checkpoint, request)
    return [*planning, _emit(checkpoint, request, lengths)]


def estimate_plan(
    source: str, out: Path, request: CompileRequest, *, force: bool
) -> list[StageEstimate]:
    """The same of `plan_model`."""
    check_plan_target(out, force=force)
    checkpoint = open_checkpoint(source, revision=request.revision)
    lengths, _ = prepare(checkpoint, request)
    return _planning(checkpoint, request, lengths)


def _planning(
    checkpoint: Checkpoint, request: CompileRequest, lengths: Lengths
) -> list[StageEstimate]:
    spec, device = checkpoint.spec, pick_device()
    dtype = measuring_dtype(checkpoint, device)
    rate = _measured_rate(spec, dtype, device)
    weights = _parameters(spec) * DTYPE_BYTES[dtype]
    base = held_bytes(spec, dtype) + _LIBRARIES_BYTES
    counts = sample_counts(lengths, request.samples)
    lines = [n for n, kinds in counts.items() for _ in range(sum(kinds.values()))]
    later = [n for n, kinds in counts.items() for _ in range(kinds["retrieval"] // 2)]
    if request.max_loss is not None:
        later = []
    checked = [lengths.unseen] * VALIDATION_SAMPLES * len(DOMAINS)
    plans = request.plans + 2
    working = max(working_bytes(spec, n, dtype, request.block) for n in lengths.profiled)
    refine = (
        StageEstimate(
            "refine",
            f"{len(later)} samples around {DRAFTS} drafts of the plan",
            3 * _forward(spec, later) / rate + _SOLVE_SECONDS,
            base + working,
        ),
    )
    return [
        StageEstimate(
            "calibrate",
            f"{len(lines)} samples",
            _forward(spec, lines) / rate
            + len(lines) * _ANSWER_TOKENS * weights * _DECODE_SECONDS_PER_BYTE,
            base + working // 4,
        ),
        StageEstimate(
            "profile",
            f"{len(lines) - len(later)} samples at {', '.join(map(str, lengths.profiled))} tokens",
            3 * (_forward(spec, lines) - _forward(spec, later)) / rate,
            base + working,
        ),
        StageEstimate(
            "predict",
            f"{LADDER_PLANS} plans of other densities measured",
            LADDER_PLANS * _forward(spec, checked) / rate + _SOLVE_SECONDS,
            base + working // 4,
        ),
        *(refine if later else ()),
        StageEstimate("optimise", f"{request.plans} plans", _SOLVE_SECONDS, base),
        StageEstimate(
            "validate",
            f"{plans} plans on {len(checked)} samples of {lengths.unseen} tokens",
            plans * _forward(spec, checked) / rate,
            base + working // 4,
        ),
    ]


def _emit(checkpoint: Checkpoint, request: CompileRequest, lengths: Lengths) -> StageEstimate:
    spec, device = checkpoint.spec, pick_device()
    dtype = measuring_dtype(checkpoint, device)
    package = request.dtype or checkpoint.dtype
    weights = _parameters(spec) * DTYPE_BYTES[dtype]
    passes = 12 if request.weights == "full" else 17
    rate = _measured_rate(spec, dtype, device)
    seconds = passes * _forward(spec, [lengths.profiled[0]]) / rate
    return StageEstimate(
        "emit",
        f"{'' if request.weights == 'full' else 'int8 '}weights, golden logits, checks",
        seconds + weights / 2e8,
        held_bytes(spec, dtype) + _LIBRARIES_BYTES + exact_bytes(spec, package, request.weights),
    )


def held_bytes(spec: ModelSpec, dtype: str) -> int:
    """The weights in `dtype` that every stage holds, in all their copies."""
    return _COPIES * _parameters(spec) * DTYPE_BYTES[dtype]


def exact_bytes(spec: ModelSpec, dtype: str, weights: str) -> int:
    """What golden logits and checks hold beside: float32, made of the weights in `dtype`.

    Rounding errors of int8 `weights` are measured in a second model.
    """
    models = 1 if weights == "full" else 2
    return _parameters(spec) * (models * DTYPE_BYTES["float32"] + DTYPE_BYTES[dtype])


def _parameters(spec: ModelSpec) -> int:
    table = spec.vocab_size * spec.hidden_size
    return table * (1 if spec.tied_embeddings else 2) + spec.num_layers * _layer_weights(spec)


def _layer_weights(spec: ModelSpec) -> int:
    attention = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim * spec.hidden_size
    return attention + 3 * spec.hidden_size * spec.intermediate_size


def _forward(spec: ModelSpec, lengths: Iterable[int]) -> float:
    """Floating-point operations of one forward pass of each length."""
    width = spec.num_heads * spec.head_dim
    linear = 2 * spec.num_layers * _layer_weights(spec)
    return float(sum(n * linear + 2 * spec.num_layers * n * n * width for n in lengths))


def working_bytes(spec: ModelSpec, length: int, dtype: str, block: int) -> int:
    """What profiling takes beside the weights.

    Running text has a loss at the most tokens; answers leave room for every layer's activations
    at lengths where text makes them anew.
    """
    text = min(length * 3 // 4, TEXT_TOKENS)
    kept = max(_kept_bytes(spec, length, scored, dtype) for scored in (text, _ANSWER_TOKENS))
    return kept + tile_bytes(spec, length, block)


def _kept_bytes(spec: ModelSpec, length: int, scored: int, dtype: str) -> int:
    itemsize = DTYPE_BYTES[dtype]
    kept = backward_bytes(spec, length, scored, itemsize)
    if kept <= ACTIVATION_BYTES_LIMIT:
        return kept
    inputs = length * spec.hidden_size * spec.num_layers * itemsize  # of the layers made anew
    return inputs + backward_bytes(spec, length, scored, itemsize, layers=2)


def _measured_rate(spec: ModelSpec, dtype: str, device: torch.device) -> float:
    """Operations a second of this model's largest product, at 512 rows."""
    kind: torch.dtype = getattr(torch, dtype)
    x = torch.ones(512, spec.hidden_size, dtype=kind, device=device)
    weight = torch.ones(spec.intermediate_size, spec.hidden_size, dtype=kind, device=device)
    float((x @ weight.T).float().sum())
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < 0.5:
        float((x @ weight.T)[0, 0])
        count += 1
    # A model's passes reach about half the rate of one product.
    return 2 * x.numel() * spec.intermediate_size * count / seconds / 2
