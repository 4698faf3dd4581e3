"""`--dry-run`: the stages of a compile or a plan with their time and memory, guessed ahead.

Time is floating-point operations over a rate measured here in half a second (`work.py`), so it is
right to a factor of two at best; memory counts every copy of the weights that a stage holds, and
activations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moac.calibration import TEXT_TOKENS
from moac.checkpoint import open_checkpoint
from moac.packaging.staging import check_target
from moac.pipeline.known import at_hand, open_plan
from moac.pipeline.loss_model import LADDER
from moac.pipeline.plan_file import check_plan_target
from moac.pipeline.planner import check_packaging, forecast, longest_session, prepare
from moac.pipeline.work import Forecast, Work
from moac.profiling.influence import backward_bytes, recomputed_layers, tile_bytes
from moac.progress.cost import parameters
from moac.progress.progress import notes
from moac.request import CompileRequest
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.spec import ModelSpec

_LIBRARIES_BYTES = 450 << 20
_ANSWER_TOKENS = 70  # that the dense model writes for one sample, about
_COPIES = 2  # the dense model in transformers, and the same weights as our runtime has them


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
    source: str,
    out: Path,
    request: CompileRequest,
    *,
    force: bool,
    plan: str | Path | None = None,
    work_dir: Path | None = None,
) -> list[StageEstimate]:
    """What `compile_model` with these arguments would do; raises as it would before any work."""
    check_target(out, force=force)
    checkpoint = open_checkpoint(source, revision=request.revision)
    notes(checkpoint.notes)
    if plan is None:
        file = None
        lengths, _ = prepare(checkpoint, request)
        notes(at_hand(checkpoint, request, out, force=force))
    else:
        file = open_plan(plan, checkpoint, request)
        lengths, _ = file.prepared(longest_session(checkpoint, request))
    request = check_packaging(checkpoint, request)
    ahead = forecast(checkpoint, request, lengths, work_dir)
    work = ahead.compile() if file is None else ahead.package(measured=file.edited)
    return _estimates(ahead, work)


def estimate_plan(
    source: str,
    out: Path,
    request: CompileRequest,
    *,
    force: bool,
    work_dir: Path | None = None,
) -> list[StageEstimate]:
    """The same of `plan_model`."""
    check_plan_target(out, force=force)
    checkpoint = open_checkpoint(source, revision=request.revision)
    notes(checkpoint.notes)
    lengths, _ = prepare(checkpoint, request)
    ahead = forecast(checkpoint, request, lengths, work_dir)
    return _estimates(ahead, ahead.plan())


def _estimates(ahead: Forecast, work: Work) -> list[StageEstimate]:
    plans = ahead.request.measuring.plans if "profile" in work.stages else 1
    told, memory = _told(ahead, plans), _memory(ahead)
    return [
        StageEstimate(stage, told[stage], seconds, memory[stage])
        for stage, seconds in work.seconds.items()
    ]


def _told(ahead: Forecast, plans: int) -> dict[str, str]:
    """What each stage does, where `plans` are found."""
    request, lengths = ahead.request, ahead.lengths
    samples, later = sum(ahead.samples.values()), sum(ahead.later.values())
    at, drafts = ", ".join(map(str, lengths.profiled)), request.measuring.drafts
    kind = "" if request.weights == "full" else f"{request.weights} "
    how = " rounded with feedback" if request.weights == "int4" else ""
    return {
        "load": "the model, native kernels",
        "rehearse": "a pass of each kind, for the time left",
        "calibrate": f"{samples} samples",
        "profile": f"{samples - later} samples at {at} tokens",
        "predict": f"{len(LADDER)} plans of other densities measured",
        "refine": f"{later} samples around {_counted(drafts, 'draft')} of the plan",
        "bisect": "the smallest density that keeps the loss",
        "optimise": _counted(plans, "plan"),
        "validate": f"{plans + 2} plans at {lengths.unseen} tokens",
        "emit": f"{kind}weights{how}, golden logits, kernels",
        "verify": "golden logits, by every target",
    }


def _memory(ahead: Forecast) -> dict[str, int]:
    """The most bytes that each stage holds."""
    spec, dtype, request = ahead.checkpoint.spec, ahead.dtype, ahead.request
    base = held_bytes(spec, dtype) + _LIBRARIES_BYTES
    working = max(working_bytes(spec, n, dtype, request.block) for n in ahead.lengths.profiled)
    package = request.dtype or ahead.checkpoint.dtype
    exact = base + exact_bytes(spec, package, request.weights)
    return {
        **dict.fromkeys(("load", "bisect", "optimise"), base),
        **dict.fromkeys(("calibrate", "predict", "validate"), base + working // 4),
        **dict.fromkeys(("rehearse", "profile", "refine"), base + working),
        **dict.fromkeys(("emit", "verify"), exact),
    }


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def held_bytes(spec: ModelSpec, dtype: str) -> int:
    """The weights in `dtype` that every stage holds, in all their copies."""
    return _COPIES * parameters(spec) * DTYPE_BYTES[dtype]


def exact_bytes(spec: ModelSpec, dtype: str, weights: str) -> int:
    """What golden logits and checks hold beside: float32, made of the weights in `dtype`.

    Rounding errors of int8 or int4 `weights` are measured in a second model, beside which the
    numbers of int4 ones lie in a byte each.
    """
    models, numbers = 1 if weights == "full" else 2, int(weights == "int4")
    return parameters(spec) * (models * DTYPE_BYTES["float32"] + DTYPE_BYTES[dtype] + numbers)


def working_bytes(spec: ModelSpec, length: int, dtype: str, block: int) -> int:
    """What profiling takes beside the weights.

    Running text has a loss at the most tokens; answers leave room for the activations of more
    layers.
    """
    text = min(length * 3 // 4, TEXT_TOKENS)
    kept = max(_kept_bytes(spec, length, scored, dtype) for scored in (text, _ANSWER_TOKENS))
    return kept + tile_bytes(spec, length, block)


def _kept_bytes(spec: ModelSpec, length: int, scored: int, dtype: str) -> int:
    itemsize = DTYPE_BYTES[dtype]
    anew = recomputed_layers(spec, length, scored, itemsize)
    if not anew:
        return backward_bytes(spec, length, scored, itemsize)
    inputs = length * spec.hidden_size * anew * itemsize  # of the layers made anew
    layers = max(spec.num_layers - anew, 2)  # the others are gone when the first are made anew
    return inputs + backward_bytes(spec, length, scored, itemsize, layers=layers)
