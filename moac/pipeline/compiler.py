"""The pipeline: a checkpoint in, a verified package out."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moac.calibration import plain_text_windows
from moac.checkpoint import open_checkpoint
from moac.export.target import emit_onnx
from moac.packaging.build_record import now, write_build
from moac.packaging.cpu_kernels import emit_cpu_kernels, spelled_out
from moac.packaging.four_bits import Rounded
from moac.packaging.fuse import head_order, pack_weights
from moac.packaging.golden import INSIDE_TOKENS, expected_prompts, largest_error, unrounded
from moac.packaging.kernels import emit_kernels
from moac.packaging.quantise import (
    as_words,
    disturb_roundings,
    disturb_weights,
    disturbed_activations,
    round_weights,
)
from moac.packaging.rounding import feedback_windows, round_layers
from moac.packaging.staging import check_target, staged
from moac.packaging.writer import (
    embed_runtime,
    write_golden,
    write_manifest,
    write_plan,
    write_weights,
)
from moac.pipeline.cap import kv_shape
from moac.pipeline.known import at_hand, open_plan
from moac.pipeline.plan_file import sealed
from moac.pipeline.planner import (
    Clock,
    Planned,
    check_packaging,
    find_plan,
    forecast,
    longest_session,
    open_workbench,
    prepare,
    taken_plan,
)
from moac.pipeline.stages import Workbench
from moac.pipeline.verify import ACTIVATIONS, FLOAT32_LIMIT, QUANTISED, Check, verify
from moac.progress.cost import Costs, Kind
from moac.progress.progress import notes, stage, step, whole
from moac.request import PLANNING, CompileRequest, check_width_targets
from moac.show.inspection import inspect_artifact
from moac.show.report import write_report
from moac.store.workspace import peak_memory_bytes, release_memory
from moac_runtime.errors import CheckFailed, MoacError
from moac_runtime.package.artifact import kv_format, open_artifact
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.golden import GoldenPrompt
from moac_runtime.package.plan import Plan
from moac_runtime.package.trust import trust

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "highspy")
DISTURBED_DRAWS = 4


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What was written. `checks`: the verification that the package passed before it stood.

    `stages`: the seconds that each took, and those estimated at the start.
    """

    path: Path
    plan: Plan
    record: dict[str, Any]
    checks: tuple[Check, ...]
    seconds: float
    peak_memory_bytes: int
    stages: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Everything but the rules, which stand in the package."""
        return {
            "path": str(self.path),
            "record": self.record,
            "checks": [check.to_json() for check in self.checks],
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "stages": self.stages,
        }


def compile_model(
    source: str | Path,
    out: str | Path,
    *,
    request: CompileRequest | None = None,
    plan: str | Path | None = None,
    work_dir: str | Path | None = None,
    force: bool = False,
) -> CompileResult:
    """Compile the checkpoint `source` into a package at `out`.

    `source`: a checkpoint directory, a hub id or a `.gguf` file. `plan`: a `plan.json` made for
    it, in place of planning, or the word "known" for the one that moac brings for this model and
    budget. `work_dir` keeps each stage's result, so that an interrupted compile
    goes on and another budget reuses the profile. Raises UsageError, CheckpointError,
    BudgetError, and CheckFailed where the package fails its own verification; then nothing stands
    at `out`.
    """
    started = time.perf_counter()
    request = request or CompileRequest()
    check_target(Path(out), force=force)
    checkpoint = open_checkpoint(str(source), revision=request.revision)
    notes(checkpoint.notes)
    file = None if plan is None else open_plan(plan, checkpoint, request)
    if file is None:
        lengths, layout = prepare(checkpoint, request)
        notes(at_hand(checkpoint, request, out, force=force))
    else:
        kv = kv_shape(checkpoint, request)
        lengths, layout = file.prepared(longest_session(checkpoint, request), kv)
        if file.plan.rounds:
            check_width_targets(f"the widths of the plan {file.path}", request.targets)
    request = check_packaging(checkpoint, request)
    ahead = forecast(checkpoint, request, lengths, work_dir)
    work = ahead.compile() if file is None else ahead.package(measured=file.edited)
    clock = Clock(work.seconds)
    with whole(work.time_left()):
        with clock("load"):
            bench = open_workbench(checkpoint, layout, request, work_dir)
        if file is None:
            planned = find_plan(bench, lengths, clock)
        else:
            planned = taken_plan(bench, file, lengths, clock)
        planned = replace(planned, record=sealed(planned.plan, planned.record))
        checks = emit(Path(out), bench, planned, clock, force=force)
    return CompileResult(
        path=Path(out),
        plan=planned.plan,
        record=planned.record,
        checks=checks,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        stages=clock.stages(),
    )


def emit(
    out: Path, bench: Workbench, planned: Planned, clock: Clock, *, force: bool
) -> tuple[Check, ...]:
    """Write the package, verify it, and only then let it stand at `out`. Raises CheckFailed."""
    with staged(out, force=force) as staging:
        with clock("emit"):
            write_package(staging, bench, planned)
            release_memory()  # of the float32 model
        with clock("verify"):
            checks = check_package(staging)
        record_trust(seal_package(staging, checks, clock), out)
    return checks


def write_package(staging: Path, bench: Workbench, planned: Planned) -> None:
    """Write everything that verification needs into the staging folder."""
    checkpoint, request = bench.checkpoint, bench.request
    plan, record = planned.plan, planned.record
    dtype = request.dtype or checkpoint.dtype
    order = head_order(plan)
    with stage("emit"):
        rounded = rounded_weights(bench, dtype)
        with step(Kind.WRITE, Costs(checkpoint.spec, DTYPE_BYTES[dtype]).weights):
            write_weights(
                staging,
                pack_weights(as_words(checkpoint.tensor, rounded), checkpoint.spec, order),
                dtype=getattr(torch, dtype),
                weights=request.weights,
                max_shard_size=request.max_shard_size,
            )
        write_plan(staging, plan, record)
        checkpoint.save_tokenizer(staging / "tokenizer")
        with step(Kind.CHECK):
            prompts, limits = golden_prompts(bench, plan, record["lengths"][0], dtype, rounded)
        write_golden(staging, prompts)
        targets = request.targets or ()
        if "onnx" in targets:
            limits |= emit_onnx(staging, checkpoint, request, plan, order, prompts)
        with step(Kind.BUILD):
            emit_kernels(staging, checkpoint.spec, plan, dtype, targets)
            emit_cpu_kernels(staging, targets, bench.workspace.root)
        embed_runtime(staging)
        with step(Kind.WRITE):
            write_manifest(
                staging,
                model=checkpoint.spec_in(dtype),
                dtype=dtype,
                capacity=request.capacity or checkpoint.spec.context,
                head_order=order,
                targets=spelled_out(targets),
                provenance=provenance(bench, planned, rounded),
                verification={"limits": limits},
                weights=request.weights,
                kv_format=kv_format(plan, dtype),
            )


def rounded_weights(bench: Workbench, dtype: str) -> dict[str, Rounded]:
    """What int4 weights round with feedback, by the checkpoint's names: the layers' matrices."""
    if bench.request.weights != "int4":
        return {}
    windows = feedback_windows(bench.checkpoint.spec, bench.tokenizer, bench.request.seed)
    with step(Kind.ROUND) as part:
        model = bench.checkpoint.load_model(dtype).float()
        rounded = round_layers(model, windows, part)
    del model
    release_memory()
    return rounded


def golden_prompts(
    bench: Workbench,
    plan: Plan,
    length: int,
    dtype: str,
    rounded: Mapping[str, Rounded],
) -> tuple[list[GoldenPrompt], dict[str, float]]:
    """A prompt inside every span and one past the finite ones, and the error each dtype is owed.

    The limit of a low-precision dtype is twice what the original model itself errs in it, of a
    mixture of experts the most in several draws of errors of that size. That of
    int8 or int4 weights against unrounded ones is twice the most that random errors of the same
    size do in several draws: the worst logits are few, and a single draw may hardly move them. So
    is what activations in 8 bits, which such weights are multiplied with, may add to the first.
    Where keys and values are rounded, sums of another order put some of them on the next code: the
    limit of float32 has twice what that does in several draws besides.
    """
    checkpoint, weights, seed = bench.checkpoint, bench.request.weights, bench.request.seed
    tokens = plain_text_windows(bench.tokenizer, length, 1, seed)[0]
    short = tokens[: min(INSIDE_TOKENS, length)]
    exact = checkpoint.load_model(dtype).float()
    prompts = expected_prompts(exact, plan, (short, tokens), weights=weights, rounded=rounded)
    draws = range(seed, seed + DISTURBED_DRAWS)
    limits = {"float32": FLOAT32_LIMIT + _flipped_error(exact, plan, prompts, draws)}
    if bench.request.rounds_activations(dtype):
        limits[ACTIVATIONS] = 2 * max(_rounded_error(exact, plan, prompts, draw) for draw in draws)
    if dtype != "float32":
        low = exact.to(getattr(torch, dtype))
        limits[dtype] = 2 * max(
            largest_error(low, plan, prompts),
            *_rerouted_errors(bench, plan, prompts, dtype, rounded),
        )
    if ACTIVATIONS in limits:
        limits[ACTIVATIONS] += limits[dtype]
    if weights != "full":
        limits[QUANTISED] = 2 * max(
            _disturbed_error(bench, plan, unrounded(prompts), dtype, draw) for draw in draws
        )
    return prompts, limits


def _flipped_error(
    model: PreTrainedModel, plan: Plan, prompts: Sequence[GoldenPrompt], draws: Iterable[int]
) -> float:
    """What codes of keys and values that are the next ones may move a logit by."""
    if not plan.rounds:
        return 0.0
    return 2 * max(largest_error(model, plan, prompts, seed=draw) for draw in draws)


def _rounded_error(
    model: PreTrainedModel, plan: Plan, prompts: Sequence[GoldenPrompt], seed: int
) -> float:
    with disturbed_activations(model, seed=seed):
        return largest_error(model, plan, prompts)


def _rerouted_errors(
    bench: Workbench,
    plan: Plan,
    prompts: Sequence[GoldenPrompt],
    dtype: str,
    rounded: Mapping[str, Rounded],
) -> list[float]:
    """Of a mixture of experts, how far logits in `dtype` are off by several draws of errors.

    Which expert is chosen jumps: where two are close, errors of rounding decide.
    """
    if all(kind.experts is None for kind in bench.checkpoint.spec.kinds):
        return [0.0]
    errors = []
    for draw in range(bench.request.seed, bench.request.seed + DISTURBED_DRAWS):
        model = bench.checkpoint.load_model(dtype).float()
        if bench.request.weights != "full":
            round_weights(model, bench.request.weights, rounded)
        kind = getattr(torch, dtype)
        disturb_roundings(model, kind, seed=draw)
        errors.append(largest_error(model.to(kind), plan, prompts))
    return errors


def _disturbed_error(
    bench: Workbench, plan: Plan, prompts: Sequence[GoldenPrompt], dtype: str, seed: int
) -> float:
    model = bench.checkpoint.load_model(dtype).float()
    disturb_weights(model, seed=seed, weights=bench.request.weights)
    return largest_error(model, plan, prompts)


def provenance(
    bench: Workbench, planned: Planned, rounded: Mapping[str, Rounded]
) -> dict[str, Any]:
    """Where the package comes from: checkpoint, arguments, versions.

    Times and host, which another compile of the same does not share, stand in `build.json`.

    Of a plan from a file, the file's name and SHA-256, and whether it is one that moac brings; how
    it was planned stands in `plan.json`. Of int4 weights how many matrices were `rounded` with
    feedback; the others that are in 4 bits were rounded to nearest.
    """
    checkpoint = bench.checkpoint
    asked = bench.request.to_json()
    if planned.file is not None:
        asked = {name: value for name, value in asked.items() if name not in PLANNING}
    return {
        "source": checkpoint.name,
        "revision": checkpoint.revision,
        "identity": checkpoint.identity,
        "arguments": asked,
        **({} if planned.file is None else {"plan": planned.file}),
        **({"rounded_with_feedback": len(rounded)} if bench.request.weights == "int4" else {}),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("moac", *_PACKAGES)},
        "device": bench.model.device.type,
        "measured_in": str(bench.model.dtype).removeprefix("torch."),
    }


def check_package(staging: Path) -> tuple[Check, ...]:
    """Verify the staged package. Raises CheckFailed."""
    with stage("verify"), step(Kind.CHECK):
        checks = tuple(verify(staging, trust=True))
    failed = [check for check in checks if not check.ok]
    if failed:
        worst = failed[0]
        raise CheckFailed(
            f"the package failed its check {worst.name!r} ({worst.value:.3g}, limit "
            f"{worst.limit:.3g}) and was not published; report this with the command you ran"
        )
    return checks


def record_trust(digest: str, out: Path) -> None:
    """Let the package's own code run here for this user, wherever it is moved.

    Before it stands at `out`, since a record of what never came to be does no harm.
    """
    try:
        trust(digest, str(out.resolve()))
    except MoacError as error:
        notes([f"the package is not recorded as one that you trust: {error}"])


def seal_package(staging: Path, checks: Sequence[Check], clock: Clock) -> str:
    """Write what was known last: the report, the verdict into the manifest, and `build.json`.

    Returns the digest of the whole.
    """
    opened = open_artifact(staging, check="sizes")
    artifact = replace(
        opened,
        verification={**opened.verification, "checks": [check.to_json() for check in checks]},
    )
    write_report(staging, inspect_artifact(artifact))
    digest = write_manifest(
        staging,
        model=artifact.spec,
        dtype=artifact.dtype,
        capacity=artifact.capacity,
        head_order=artifact.head_order,
        targets=list(artifact.targets),
        provenance=artifact.provenance,
        verification=artifact.verification,
        weights=artifact.weights,
        kv_format=artifact.kv_format,
    )
    write_build(staging, build_record(clock))
    return digest


def build_record(clock: Clock) -> dict[str, Any]:
    """When and on what this package is made, and what each stage took."""
    instructions = torch.backends.cpu.get_cpu_capability()  # which decide the order of sums
    return {
        "created": now(),
        "processor": f"{platform.machine()} {instructions}",
        "threads": torch.get_num_threads(),
        **clock.to_json(),
    }
