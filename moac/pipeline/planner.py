"""From an opened checkpoint to a plan: what `moac plan` stops at and `moac compile` packages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moac.calibration import read_calibration
from moac.calibration.jsonl import user_opening
from moac.calibration.prompt import PromptFormat
from moac.checkpoint import Checkpoint, open_checkpoint
from moac.export.target import require_onnx
from moac.goal import MaxLoss
from moac.lengths import Lengths, choose_lengths
from moac.packaging.cpu_kernels import default_targets, require_cpu
from moac.packaging.kernels import cuda_archs, require_kernels
from moac.pipeline.cap import KvCap, kv_shape
from moac.pipeline.loss_model import learn, smallest_within
from moac.pipeline.plan_file import PlanFile, check_plan_target, made_for, sealed, write_plan_file
from moac.pipeline.reading import open_reader
from moac.pipeline.stages import (
    Measured,
    Workbench,
    calibrate,
    halves,
    optimise,
    planning_problem,
    profile,
    refine,
    rehearse,
    validate,
)
from moac.pipeline.work import Forecast
from moac.planning import FrontPoint, HeadLayout, Problem, layerwise_plan
from moac.planning.capacities import largest_record, largest_share
from moac.planning.problem import check_budget
from moac.progress.cost import Kind
from moac.progress.progress import notes, stage, step, whole
from moac.request import CompileRequest
from moac.store.work_dir import default_work_dir
from moac.store.workspace import Workspace, peak_memory_bytes, pick_device
from moac_runtime.errors import UsageError
from moac_runtime.host.cores import set_torch_threads
from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.plan import Plan, rule_to_json
from moac_runtime.package.weight_formats import int4_obstacle

_OF_THE_SEARCH = ("predicted_loss", "prediction", "solver", "front", "max_loss")


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and how it was found: what `plan.json` holds, not yet sealed.

    `file`: name, SHA-256, whether it was edited and whether moac brings it, where the plan was
    taken from a file.
    """

    plan: Plan
    record: dict[str, Any]
    file: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What `moac plan` wrote, and what it took; the file itself tells no time.

    `stages`: the seconds that each took, and those estimated at the start.
    """

    path: Path
    plan: Plan
    record: dict[str, Any]
    seconds: float
    peak_memory_bytes: int
    stages: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Everything but the rules, which stand in the file."""
        return {
            "path": str(self.path),
            "record": self.record,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "stages": self.stages,
        }


def plan_model(
    source: str | Path,
    out: str | Path,
    *,
    request: CompileRequest | None = None,
    work_dir: str | Path | None = None,
    force: bool = False,
) -> PlanResult:
    """Find a plan for the checkpoint `source` and write it to the file `out`.

    The stages are those of `compile_model` up to its package, kept in the same work folder, so a
    later compile reuses them. Raises UsageError, CheckpointError, BudgetError.
    """
    started = time.perf_counter()
    request = request or CompileRequest()
    check_plan_target(Path(out), force=force)
    checkpoint = open_checkpoint(str(source), revision=request.revision)
    notes(checkpoint.notes)
    lengths, layout = prepare(checkpoint, request)
    work = forecast(checkpoint, request, lengths, work_dir).plan()
    clock = Clock(work.seconds)
    with whole(work.time_left()):
        with clock("load"):
            bench = open_workbench(checkpoint, layout, request, work_dir)
        found = find_plan(bench, lengths, clock)
    record = sealed(found.plan, found.record)
    write_plan_file(Path(out), found.plan, record, force=force)
    return PlanResult(
        path=Path(out),
        plan=found.plan,
        record=record,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        stages=clock.stages(),
    )


def prepare(checkpoint: Checkpoint, request: CompileRequest) -> tuple[Lengths, HeadLayout]:
    """What the request means for this checkpoint; raises before any work where it cannot be."""
    spec = checkpoint.spec
    _check_calibration(checkpoint, request)
    layout = HeadLayout(
        num_kv_heads=spec.num_kv_heads,
        sink=request.sink,
        block=request.block,
        min_span=request.min_span,
        windows=spec.windows,
        kv=None if request.widths == (None,) else kv_shape(checkpoint, request),
        widths=request.widths,
    )
    check_capacity(checkpoint, request)
    cap = KvCap.of(checkpoint, request)
    lengths = choose_lengths(
        request.lengths,
        context=spec.context,
        block=request.block,
        min_span=request.min_span,
        gpu=pick_device().type == "cuda",
        effort=request.measuring,
        upto=longest_session(checkpoint, request),
        capped=None if cap is None else cap.length,
    )
    check_budget(layout, _budget(request, cap, layout, lengths), lengths.planned)
    return lengths, layout


def _check_calibration(checkpoint: Checkpoint, request: CompileRequest) -> None:
    """Raise UsageError, naming the line, for a sample of the user's that cannot be fed."""
    if request.calibration is None:
        return
    format, size = PromptFormat(checkpoint.load_tokenizer()), checkpoint.spec.vocab_size
    for sample in read_calibration(request.calibration):
        tokens = [*user_opening(sample, format), *format.encode(sample.response or "")]
        beyond = next((token for token in tokens if token >= size), None)
        if beyond is not None:
            spelled = format.tokenizer.convert_ids_to_tokens(beyond)
            raise UsageError(
                f"{sample.source} holds {spelled!r}, for which the model has no embedding; "
                "leave it out"
            )


def check_packaging(checkpoint: Checkpoint, request: CompileRequest) -> CompileRequest:
    """The request with its targets settled; raises, before any work, where they cannot be made."""
    check_capacity(checkpoint, request)
    spec, dtype = checkpoint.spec, request.dtype or checkpoint.dtype
    if request.weights == "int4" and (reason := int4_obstacle(spec)):
        raise UsageError(reason)
    if request.targets is None:
        return replace(request, targets=default_targets(spec, dtype))
    if "onnx" in request.targets:
        require_onnx(spec)
    if cuda_archs(request.targets):
        require_kernels(spec, None, dtype)
    require_cpu(spec, dtype, request.targets)
    return request


def check_capacity(checkpoint: Checkpoint, request: CompileRequest) -> None:
    """Raise UsageError for a capacity that the model has not."""
    context = checkpoint.spec.context
    if request.capacity is not None and not 1 <= request.capacity <= context:
        raise UsageError(
            f"the capacity {request.capacity} is not within 1 and the model's context of "
            f"{context} tokens"
        )


def longest_session(checkpoint: Checkpoint, request: CompileRequest) -> int:
    """The tokens of the longest session that the package opens."""
    return request.capacity or checkpoint.spec.context


def open_workbench(
    checkpoint: Checkpoint,
    layout: HeadLayout,
    request: CompileRequest,
    work_dir: str | Path | None,
) -> Workbench:
    """Load the dense model, on the GPU if there is one, for calibration and measurement."""
    set_torch_threads()
    device = pick_device()
    dtype = measuring_dtype(checkpoint, device)
    with stage("load"):
        with step(Kind.LOAD):
            workspace = Workspace(_root(work_dir), checkpoint.name, checkpoint.identity)
            workspace.prepare()
            model = checkpoint.load_model(dtype, device)
        with step(Kind.BUILD):
            reader = open_reader(checkpoint, dtype, device, workspace.root)
    return Workbench(
        checkpoint=checkpoint,
        model=model,
        reader=reader,
        tokenizer=checkpoint.load_tokenizer(),
        layout=layout,
        workspace=workspace,
        request=request,
    )


def forecast(
    checkpoint: Checkpoint,
    request: CompileRequest,
    lengths: Lengths,
    work_dir: str | Path | None,
) -> Forecast:
    """What the work of a request will be, before any of it is done."""
    set_torch_threads()  # the machine's speed is measured as it will be used
    device = pick_device()
    return Forecast(
        checkpoint=checkpoint,
        request=request,
        lengths=lengths,
        counts=sample_counts(lengths, request.measuring.samples),
        dtype=measuring_dtype(checkpoint, device),
        device=device,
        kept=_root(work_dir),
    )


def _root(work_dir: str | Path | None) -> Path:
    return Path(work_dir) if work_dir is not None else default_work_dir()


def measuring_dtype(checkpoint: Checkpoint, device: torch.device) -> str:
    """The checkpoint's dtype where the device computes in it, else float32."""
    if device.type == "cuda" or checkpoint.dtype == "float32":
        return checkpoint.dtype
    native = checkpoint.dtype == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if native else "float32"


def sample_counts(lengths: Lengths, samples: int) -> dict[int, dict[str, int]]:
    """Calibration samples `[length][domain]`.

    `samples`: of running text at the shortest length, of which longer ones hold more tokens. A
    retrieval sample holds one answer whatever its length, so there are twice as many, and they
    fall more slowly with the length, whose cost rises faster: what unseen answers lose falls with
    each sample more. What documents ask for, the other domains mostly ask for too
    (benchmarks/influence.py).
    """
    base = lengths.profiled[0]
    return {
        n: {
            "retrieval": max(2, round(2 * samples * (base / n) ** 0.5)),
            "documents": max(1, int(0.6 * samples * base / n)),
            "text": max(min(2, samples), round(samples * (base / n) ** 0.6)),
        }
        for n in lengths.profiled
    }


def find_plan(bench: Workbench, lengths: Lengths, clock: Clock) -> Planned:
    """Calibrate, profile, learn what losses follow, optimise, and measure the best plans."""
    request, goal = bench.request, bench.request.goal
    cap = KvCap.of(bench.checkpoint, request)
    counts = sample_counts(lengths, request.measuring.samples)
    with clock("rehearse"):
        rehearse(bench, counts, lengths.unseen)
    with clock("calibrate"):
        samples = calibrate(bench, counts)
    if not isinstance(goal, MaxLoss):
        samples, later = halves(samples)
    with clock("profile"):
        tables = profile(bench, samples)

    def problem_at(budget: float) -> Problem:
        return planning_problem(bench, samples, tables, lengths, budget)

    with clock("predict"):
        model = learn(bench, samples, tables, lengths, problem_at)
    if not isinstance(goal, MaxLoss):
        budget = _budget(request, cap, bench.layout, lengths)
        with clock("refine"):
            samples, tables = refine(bench, samples, tables, later, lengths, budget)
        with clock("optimise"):
            problem = problem_at(budget)
            front = optimise(bench, problem, lengths)
    else:
        with clock("optimise"):
            problem, front = smallest_within(bench, lengths, problem_at, model, goal.nats)
    with clock("validate"):
        best, measured = validate(bench, [point.plan for point in front], lengths)
    plan = front[best].plan
    record = {
        "model": made_for(bench.checkpoint),
        "arguments": request.planning(),
        "prompts": "chat" if PromptFormat(bench.tokenizer).has_template else "raw",
        **planning_record(
            lengths, problem, front, front[best], measured, kv_shape(bench.checkpoint, request)
        ),
        **model.record(front, plan),
        **({} if cap is None else {"kv_cap": cap.record(plan)}),
        **({"max_loss": goal.nats} if isinstance(goal, MaxLoss) else {}),
    }
    return Planned(plan, record)


def taken_plan(bench: Workbench, file: PlanFile, lengths: Lengths, clock: Clock) -> Planned:
    """The plan of a file. One that was edited is measured, and told without what no longer holds.

    Densities are counted again, up to the longest session of this package; where one passes the
    budget that the file names, that is said, and it is the budget of the package.
    """
    origin = {
        "file": file.path.name,
        "sha256": file.sha256,
        "edited": file.edited,
        "known": file.known,
    }
    plan, record = file.plan, file.record
    kv = kv_shape(bench.checkpoint, bench.request)
    notes(_over_budget(file, lengths, kv))
    if file.edited:
        with clock("validate"):
            _, measured = validate(bench, [plan], lengths)
        record = {k: v for k, v in record.items() if k not in _OF_THE_SEARCH}
        record |= {"chosen": measured[0].name, **measured_record(measured)}
    held = density_record(plan, lengths, kv)
    budget = max(record["budget"], largest_share(plan, lengths.capacities, kv)[0])
    return Planned(plan, {**record, "budget": budget, **held}, origin)


def _over_budget(file: PlanFile, lengths: Lengths, kv: KvShape) -> Iterator[str]:
    """What there is to say where the plan of a file holds more than the budget it names."""
    share, length = largest_share(file.plan, lengths.capacities, kv)
    if share > file.record["budget"]:
        yield (
            f"the plan {file.path} holds {share:.4f} of the dense KV memory at {length} tokens, "
            f"above its budget of {file.record['budget']:g}; the package tells that as its budget"
        )


def planning_record(
    lengths: Lengths,
    problem: Problem,
    front: Sequence[FrontPoint],
    chosen: FrontPoint,
    measured: Sequence[Measured],
    kv: KvShape,
) -> dict[str, Any]:
    """What `plan.json` holds beside the rules: how the plan was found and what it costs."""
    names = [objective.name for objective in problem.objectives]
    return {
        "budget": problem.budget,
        "lengths": list(lengths.profiled),
        "extrapolated": lengths.extrapolated,
        "unseen": lengths.unseen,
        "rules_per_layer": problem.rules_per_layer,
        **density_record(chosen.plan, lengths, kv),
        **measured_record(measured),
        "solver": asdict(chosen.record),
        "chosen": f"plan {[point is chosen for point in front].index(True) + 1}",
        "front": [
            {
                "plan": f"plan {number}",
                "losses": dict(zip(names, point.losses, strict=True)),
                "solver": asdict(point.record),
                "chosen": point is chosen,
            }
            for number, point in enumerate(front, start=1)
        ],
        "layerwise": [rule_to_json(layer[0]) for layer in layerwise_plan(problem).rules],
    }


def density_record(plan: Plan, lengths: Lengths, kv: KvShape) -> dict[str, Any]:
    """Densities at the planned lengths, and the largest of any session from the shortest up.

    Of a plan with widths also the shares of bytes, which are others.
    """
    found = {
        "density": {str(n): plan.density(n) for n in lengths.planned},
        "largest_density": largest_record(plan, lengths.capacities),
    }
    if not plan.rounds:
        return found
    shares = {str(n): plan.byte_share(n, kv) for n in lengths.planned}
    largest = largest_record(plan, lengths.capacities, kv)
    return found | {"byte_share": shares, "largest_byte_share": largest}


def measured_record(measured: Sequence[Measured]) -> dict[str, Any]:
    """Every measured plan's losses."""
    return {
        "measured_loss": [
            {"plan": row.name, "losses": row.losses, "loss": row.loss} for row in measured
        ]
    }


class Clock:
    """Wall seconds by stage, and the most memory held by the end of each.

    `estimated`: the seconds that each was thought to take before any work.
    """

    def __init__(self, estimated: Mapping[str, float]) -> None:
        self.estimated = dict(estimated)
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.peaks[name] = peak_memory_bytes()

    def to_json(self) -> dict[str, Any]:
        """`seconds`, `estimated_seconds` and `peak_memory_by_stage`.

        That is in bytes, from the start to the stage's end.
        """
        return {
            "seconds": _rounded(self.seconds),
            "estimated_seconds": _rounded(self.estimated),
            "peak_memory_by_stage": dict(self.peaks),
            "peak_memory_bytes": max(self.peaks.values()),
        }

    def stages(self) -> dict[str, dict[str, float]]:
        """Of each stage, `seconds` and `estimated_seconds`."""
        took, thought = _rounded(self.seconds), _rounded(self.estimated)
        return {name: {"seconds": took[name], "estimated_seconds": thought[name]} for name in took}


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in seconds.items()}


def _budget(
    request: CompileRequest, cap: KvCap | None, layout: HeadLayout, lengths: Lengths
) -> float:
    return request.goal.share if cap is None else cap.budget(layout, lengths.planned)
