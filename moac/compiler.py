"""The pipeline: a checkpoint in, a verified package out."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moac.calibration import DenseModel, plain_text_windows
from moac.checkpoint import Checkpoint, open_checkpoint
from moac.export.target import emit_onnx, require_onnx
from moac.inspection import inspect_artifact
from moac.lengths import Lengths, choose_lengths
from moac.packaging.fuse import head_order, pack_weights
from moac.packaging.golden import golden_prompt, reference_logits
from moac.packaging.kernels import cuda_archs, emit_kernels, require_kernels
from moac.packaging.staging import check_target, staged
from moac.packaging.writer import (
    embed_runtime,
    write_golden,
    write_manifest,
    write_plan,
    write_weights,
)
from moac.planning import (
    FrontPoint,
    Layout,
    Problem,
    largest_density_between,
    layerwise_plan,
)
from moac.planning.problem import check_budget
from moac.progress import stage
from moac.report import write_report
from moac.request import CompileRequest
from moac.stages import Bench, Measured, calibrate, optimise, profile, validate
from moac.verify import FLOAT32_LIMIT, Check, verify
from moac.workspace import Workspace, default_work_dir, peak_memory_bytes, pick_device
from moac_runtime.artifact import open_artifact
from moac_runtime.errors import CheckFailed, UsageError
from moac_runtime.golden import GoldenPrompt
from moac_runtime.plan import Plan

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "highspy")
_INSIDE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What was written. `checks`: the verification that the package passed before it stood."""

    path: Path
    plan: Plan
    record: dict[str, Any]
    checks: tuple[Check, ...]
    seconds: float
    peak_memory_bytes: int


def compile_model(
    source: str | Path,
    out: str | Path,
    *,
    request: CompileRequest | None = None,
    work_dir: str | Path | None = None,
    force: bool = False,
) -> CompileResult:
    """Compile the checkpoint `source` into a package at `out`.

    `source`: a checkpoint directory, a hub id or a `.gguf` file. `work_dir` keeps each stage's
    result, so that an interrupted compile goes on and another budget reuses the profile. Raises
    UsageError, CheckpointError, BudgetError, and CheckFailed where the package fails its own
    verification; then nothing stands at `out`.
    """
    started = time.perf_counter()
    request = request or CompileRequest()
    check_target(Path(out), force=force)
    checkpoint = open_checkpoint(str(source), revision=request.revision)
    lengths, layout = prepare(checkpoint, request)
    clock = _Clock()

    with clock("load"):
        bench = open_bench(checkpoint, layout, request, work_dir)
    with clock("calibrate"):
        counts = sample_counts(lengths, request.samples)
        samples = calibrate(bench, counts)
    with clock("profile"):
        tables = profile(bench, samples)
    with clock("optimise"):
        front, problem = optimise(bench, samples, tables, lengths)
    with clock("validate"):
        chosen, measured = validate(bench, front, lengths)
    record = planning_record(request, lengths, problem, front, chosen, measured)
    with staged(Path(out), force=force) as staging:
        with clock("emit"):
            write_package(staging, bench, chosen.plan, record)
        with clock("verify"):
            checks = check_package(staging)
        seal_package(staging, checks, clock)
    return CompileResult(
        path=Path(out),
        plan=chosen.plan,
        record=record,
        checks=checks,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def prepare(checkpoint: Checkpoint, request: CompileRequest) -> tuple[Lengths, Layout]:
    """What the request means for this checkpoint; raises before any work where it cannot be."""
    spec = checkpoint.spec
    layout = Layout(
        num_kv_heads=spec.num_kv_heads,
        sink=request.sink,
        block=request.block,
        min_span=request.min_span,
        windows=spec.windows,
    )
    lengths = choose_lengths(
        request.lengths,
        context=spec.context,
        block=request.block,
        min_span=request.min_span,
        gpu=pick_device().type == "cuda",
    )
    if request.capacity is not None and not 1 <= request.capacity <= spec.context:
        raise UsageError(
            f"the capacity {request.capacity} is not within 1 and the model's context of "
            f"{spec.context} tokens"
        )
    check_budget(layout, request.budget, lengths.planned)
    if "onnx" in request.targets:
        require_onnx()
    if cuda_archs(request.targets):
        require_kernels(spec, None, request.dtype or checkpoint.dtype)
    return lengths, layout


def open_bench(
    checkpoint: Checkpoint, layout: Layout, request: CompileRequest, work_dir: str | Path | None
) -> Bench:
    """Load the dense model, on the GPU if there is one, for calibration and measurement."""
    device = pick_device()
    dtype = measuring_dtype(checkpoint, device)
    return Bench(
        checkpoint=checkpoint,
        model=checkpoint.load_model(dtype, device),
        reader=DenseModel(checkpoint, dtype, device),
        tokenizer=checkpoint.load_tokenizer(),
        layout=layout,
        workspace=Workspace(Path(work_dir) if work_dir is not None else default_work_dir()),
        request=request,
    )


def measuring_dtype(checkpoint: Checkpoint, device: torch.device) -> str:
    """The checkpoint's dtype where the device computes in it, else float32."""
    if device.type == "cuda" or checkpoint.dtype == "float32":
        return checkpoint.dtype
    native = checkpoint.dtype == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if native else "float32"


def sample_counts(lengths: Lengths, shortest: int) -> dict[int, int]:
    """Calibration samples per domain: fewer the longer they are, two at least."""
    base = lengths.profiled[0]
    return {n: max(min(2, shortest), round(shortest * base / n)) for n in lengths.profiled}


def planning_record(
    request: CompileRequest,
    lengths: Lengths,
    problem: Problem,
    front: Sequence[FrontPoint],
    chosen: FrontPoint,
    measured: Sequence[Measured],
) -> dict[str, Any]:
    """What `plan.json` holds beside the rules: how the plan was found and what it costs."""
    names = [objective.name for objective in problem.objectives]
    shortest, longest = lengths.planned[0], lengths.planned[-1]
    most, where = largest_density_between(chosen.plan, shortest, longest)
    return {
        "budget": request.budget,
        "lengths": list(lengths.profiled),
        "extrapolated": lengths.extrapolated,
        "unseen": lengths.unseen,
        "rules_per_layer": request.rules_per_layer,
        "density": {str(n): chosen.plan.density(n) for n in lengths.planned},
        "largest_density_between": {"density": most, "length": where},
        "predicted_loss": dict(zip(names, chosen.losses, strict=True)),
        "measured_loss": [
            {"plan": row.name, "losses": row.losses, "loss": row.loss} for row in measured
        ],
        "solver": asdict(chosen.record),
        "front": [
            {
                "plan": f"plan {number}",
                "losses": dict(zip(names, point.losses, strict=True)),
                "solver": asdict(point.record),
                "chosen": point is chosen,
            }
            for number, point in enumerate(front, start=1)
        ],
        "layerwise": [[layer[0].alpha, layer[0].beta] for layer in layerwise_plan(problem).rules],
    }


def write_package(staging: Path, bench: Bench, plan: Plan, record: dict[str, Any]) -> None:
    """Write everything that verification needs into the staging folder."""
    checkpoint, request = bench.checkpoint, bench.request
    dtype = request.dtype or checkpoint.dtype
    order = head_order(plan)
    with stage("emit") as advance:
        write_weights(
            staging,
            pack_weights(checkpoint.tensor, checkpoint.spec, order),
            dtype=getattr(torch, dtype),
            max_shard_size=request.max_shard_size,
        )
        advance(1, 3)
        write_plan(staging, plan, record)
        checkpoint.save_tokenizer(staging / "tokenizer")
        prompts, limits = golden_prompts(bench, plan, record["lengths"][0], dtype)
        write_golden(staging, prompts)
        if "onnx" in request.targets:
            limits |= emit_onnx(staging, checkpoint, request, plan, order, prompts)
        emit_kernels(staging, checkpoint.spec, plan, dtype, request.targets)
        advance(2, 3)
        embed_runtime(staging)
        write_manifest(
            staging,
            model=checkpoint.spec,
            dtype=dtype,
            capacity=request.capacity or checkpoint.spec.context,
            head_order=order,
            targets=list(request.targets),
            provenance=provenance(bench),
            verification={"limits": limits},
        )
        advance(3, 3)


def golden_prompts(
    bench: Bench, plan: Plan, length: int, dtype: str
) -> tuple[list[GoldenPrompt], dict[str, float]]:
    """A prompt inside every span and one past the finite ones, and the error each dtype is owed.

    The limit of a low-precision dtype is twice what the original model itself errs in it.
    """
    checkpoint = bench.checkpoint
    tokens = plain_text_windows(bench.tokenizer, length, 1, bench.request.seed)[0]
    short = tokens[: min(_INSIDE_TOKENS, length)]
    exact = checkpoint.load_model(dtype).float()
    prompts = [golden_prompt(exact, plan, row) for row in (short, tokens)]
    limits = {"float32": FLOAT32_LIMIT}
    if dtype != "float32":
        rounded = exact.to(getattr(torch, dtype))
        errors = [
            (reference_logits(rounded, plan, p.tokens.tolist(), p.positions.tolist()) - p.logits)
            .abs()
            .max()
            for p in prompts
        ]
        limits[dtype] = 2 * float(max(errors))
    return prompts, limits


def provenance(bench: Bench) -> dict[str, Any]:
    """Where the package comes from: checkpoint, arguments, versions, host, time."""
    checkpoint = bench.checkpoint
    return {
        "source": checkpoint.source if checkpoint.revision else Path(checkpoint.source).name,
        "revision": checkpoint.revision,
        "fingerprint": checkpoint.fingerprint,
        "arguments": json.loads(json.dumps(asdict(bench.request), default=str)),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("moac", *_PACKAGES)},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "device": bench.model.device.type,
        "measured_in": str(bench.model.dtype).removeprefix("torch."),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_package(staging: Path) -> tuple[Check, ...]:
    """Verify the staged package. Raises CheckFailed."""
    with stage("verify") as advance:
        checks = tuple(verify(staging))
        advance(1, 1)
    failed = [check for check in checks if not check.ok]
    if failed:
        worst = failed[0]
        raise CheckFailed(
            f"the package failed its check {worst.name!r} ({worst.value:.3g}, limit "
            f"{worst.limit:.3g}) and was not published; report this with the command you ran"
        )
    return checks


def seal_package(staging: Path, checks: Sequence[Check], clock: _Clock) -> None:
    """Write what was known last: the verdict and the cost into the manifest, and the report."""
    opened = open_artifact(staging, check="sizes")
    artifact = replace(
        opened,
        provenance={**opened.provenance, **clock.to_json()},
        verification={**opened.verification, "checks": [check.to_json() for check in checks]},
    )
    write_report(staging, inspect_artifact(artifact))
    write_manifest(
        staging,
        model=artifact.spec,
        dtype=artifact.dtype,
        capacity=artifact.capacity,
        head_order=artifact.head_order,
        targets=list(artifact.targets),
        provenance=artifact.provenance,
        verification=artifact.verification,
    )


class _Clock:
    """Wall seconds by stage, and the most memory held by the end of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.peaks[name] = peak_memory_bytes()

    def to_json(self) -> dict[str, Any]:
        """`seconds` and `peak_memory_by_stage` (bytes, from the start to the stage's end)."""
        return {
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "peak_memory_by_stage": dict(self.peaks),
            "peak_memory_bytes": max(self.peaks.values()),
        }
