"""The stages between a checkpoint and a plan, each kept in the work folder under its key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from moac.calibration import (
    MEASURED_KINDS,
    CalibrationSample,
    build_calibration,
    read_calibration,
    user_samples,
)
from moac.lengths import Lengths
from moac.packaging.golden import reference_logits
from moac.pipeline.reading import Reader
from moac.planning import (
    FrontPoint,
    HeadLayout,
    Problem,
    SolverOptions,
    candidate_rules,
    matching_uniform,
    pareto_front,
    solve_weighted,
)
from moac.planning.between import spend_between
from moac.planning.beyond import spend_beyond
from moac.planning.capacities import largest_share
from moac.planning.objectives import COUNTING, length_objectives
from moac.planning.prediction import student
from moac.planning.rules import with_widths
from moac.planning.uniform import matching_uniforms, reference_plan
from moac.profiling.influence import sample_influence
from moac.progress.cost import Costs, Kind
from moac.progress.progress import passed, stage, step
from moac.request import CompileRequest
from moac.store.keys import result_key
from moac.store.workspace import Workspace, release_memory
from moac_runtime.package.kv_format import KV_BITS
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule

if TYPE_CHECKING:
    from moac.checkpoint import Checkpoint

REHEARSED = 256  # tokens of a pass as checks make them
VALIDATION_SAMPLES = 2
_FRONT_GAP = 1e-2
_NODES_A_SEARCH = 500
_UNSEEN_SEED = 1_000_003


@dataclass(frozen=True, slots=True)
class Workbench:
    """The dense model at work: everything a stage needs to measure and to keep results."""

    checkpoint: Checkpoint
    model: Any
    reader: Reader
    tokenizer: Any
    layout: HeadLayout
    workspace: Workspace
    request: CompileRequest

    @property
    def costs(self) -> Costs:
        """What its steps cost."""
        return Costs(self.checkpoint.spec, self.model.dtype.itemsize)

    def key(self, kind: str, **parts: Any) -> str:
        """The key of a result of `kind` that was measured in this model with `parts`."""
        return result_key(kind, self.checkpoint, self.model, self.tokenizer, **parts)


@dataclass(frozen=True, slots=True)
class Measured:
    """A plan's mean answer-token loss in nats, per domain, at the unseen length."""

    name: str
    losses: dict[str, float]

    @property
    def loss(self) -> float:
        """The mean over domains."""
        return sum(self.losses.values()) / len(self.losses)


def rehearse(bench: Workbench, counts: Mapping[int, Mapping[str, int]], unseen: int) -> None:
    """A pass of each kind that takes long, so that the time left is soon known to be right.

    Backward pass and measurement are of running text, which takes no answers, and are kept for
    the stages that ask for them. Checks run on the CPU, so only there a pass shows their speed.
    """
    shortest, seed = min(counts), bench.request.seed
    with stage("rehearse"):
        known = _domain_samples(bench, shortest, "text", counts[shortest]["text"], seed)
        _sample_table(bench, known[0], None)
        held_out = _domain_samples(bench, unseen, "text", VALIDATION_SAMPLES, seed + _UNSEEN_SEED)
        sample_loss(bench, held_out[0], None)
        if bench.model.device.type == "cpu":
            tokens = known[0].token_ids[:REHEARSED]
            with step(Kind.CHECK, bench.costs.forward(len(tokens))):
                reference_logits(bench.model, bench.reader.dense, tokens, [len(tokens) - 1])


def calibrate(
    bench: Workbench, counts: Mapping[int, Mapping[str, int]]
) -> list[CalibrationSample]:
    """`counts[length][domain]` samples, and the user's own where a file was given."""
    with stage("calibrate"):
        samples = _samples(bench, counts, bench.request.seed)
        if bench.request.calibration is not None:
            samples += _users_own(bench, sorted(counts))
    return samples


def profile(bench: Workbench, samples: Sequence[CalibrationSample]) -> list[Tensor]:
    """Each sample's influence `[layers, kv_heads, spans]`, in the samples' order.

    Where heads may have widths, `[1 + widths, layers, kv_heads, spans]`: see `sample_influence`.
    Long ones go first: the time left is soon known then, and so is memory that falls short.
    """
    tables: dict[int, Tensor] = {}
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].token_ids))
    work = sum(bench.costs.backward(len(sample.token_ids)) for sample in samples)
    with stage("profile", {Kind.BACKWARD: work}):
        for number in order:
            tables[number] = _sample_table(bench, samples[number], None)
    return [tables[number] for number in range(len(samples))]


def planning_problem(
    bench: Workbench,
    samples: Sequence[CalibrationSample],
    tables: Sequence[Tensor],
    lengths: Lengths,
    budget: float,
) -> Problem:
    """The choice of rules that `budget` leaves at the planned lengths.

    Within a budget of 1 nothing has to be dropped, so nothing may, whatever first order says that
    answers would gain; nor within less, where all of it fits in the widest width asked for.
    """
    request, layout = bench.request, bench.layout
    uniform = reference_plan(layout, budget=budget, lengths=lengths.planned)
    whole = replace(DENSE, bits=layout.widths[0])
    rules: tuple[Rule, ...] = (whole,)
    if largest_share(layout.uniform(whole), lengths.capacities, layout.kv)[0] > budget:
        found = candidate_rules(
            lengths.profiled,
            block=request.block,
            min_span=request.min_span,
            extrapolated=[n for n in lengths.planned if n not in lengths.profiled],
        )
        rules = with_widths(found, layout.widths)
    return Problem(
        layout=layout,
        rules=rules,
        lengths=lengths.planned,
        objectives=tuple(length_objectives(samples, tables, uniform)),
        budget=budget,
        rules_per_layer=request.rules_per_layer,
        upto=lengths.upto,
    )


def halves(
    samples: Sequence[CalibrationSample],
) -> tuple[list[CalibrationSample], list[CalibrationSample]]:
    """Samples to profile around the dense model, and those to profile around a draft.

    The latter are every second one, of each length, of the samples whose answers stand at one
    place: what a plan does to them all heads do together.
    """
    first: list[CalibrationSample] = []
    later: list[CalibrationSample] = []
    met: dict[tuple[int, str], int] = {}
    for sample in samples:
        group = (sample.length, sample.domain)
        met[group] = met.get(group, 0) + 1
        answers = sample.domain not in COUNTING
        (later if answers and met[group] % 2 == 0 else first).append(sample)
    return first, later


def refine(
    bench: Workbench,
    samples: Sequence[CalibrationSample],
    tables: Sequence[Tensor],
    later: Sequence[CalibrationSample],
    lengths: Lengths,
    budget: float,
) -> tuple[list[CalibrationSample], list[Tensor]]:
    """`samples` and those `later`, which are profiled around drafts of the plan, and their tables.

    Around the dense model influence is a gradient where nothing is dropped yet; what heads do
    together shows around the plan, and a mean of both ends is right to the second order. Each
    draft is made of all that was profiled before, so that drafts settle.
    """
    known, found = list(samples), list(tables)
    drafts = bench.request.measuring.drafts
    work = sum(bench.costs.backward(len(sample.token_ids)) for sample in later)
    with stage("refine", {Kind.BACKWARD: work, Kind.SOLVE: min(drafts, len(later))}):
        for part in filter(None, (later[number::drafts] for number in range(drafts))):
            draft = best_weighted(bench, planning_problem(bench, known, found, lengths, budget))
            for sample in part:
                known.append(sample)
                found.append(_sample_table(bench, sample, draft.plan))
    return known, found


def optimise(
    bench: Workbench, problem: Problem, lengths: Lengths, first: FrontPoint | None = None
) -> list[FrontPoint]:
    """`first`, or the plan that loses least over all lengths together, then others of the front.

    What they leave of the budget beyond the profiled lengths is spent, then what is left between.
    """
    request = bench.request
    options = _solver_options(request)
    kept = sorted({*lengths.profiled, lengths.unseen})
    with stage("optimise"):
        first = first or best_weighted(bench, problem)
        plans = request.measuring.plans
        with step(Kind.SOLVE, front_solves(plans, len(problem.objectives))):
            front = pareto_front(problem, points=plans, options=options)
        others = [point for point in front if point.plan != first.plan]
        points = [first, *others[: plans - 1]]
        with step(Kind.SOLVE, len(points)):
            spent = [spend_beyond(problem, point.plan, kept, options=options) for point in points]
        spent = [spend_between(problem, plan) for plan in spent]
    return [replace(point, plan=plan) for point, plan in zip(points, spent, strict=True)]


def best_weighted(bench: Workbench, problem: Problem) -> FrontPoint:
    """The plan that loses least over all objectives together: one solve, where a front is many."""
    weights = {objective.name: 1.0 for objective in problem.objectives}
    with step(Kind.SOLVE, 1):
        return solve_weighted(problem, weights, options=_solver_options(bench.request))


def front_solves(plans: int, objectives: int) -> int:
    """Programs solved, about, for a front of `plans`."""
    return 2 * objectives + plans


def _solver_options(request: CompileRequest) -> SolverOptions:
    """A limit on distinct rules makes the program hard: there a search may end at its nodes."""
    limited = request.rules_per_layer is not None
    return SolverOptions(gap=_FRONT_GAP, nodes=_NODES_A_SEARCH if limited else None)


def validate(
    bench: Workbench, plans: Sequence[Plan], lengths: Lengths
) -> tuple[int, list[Measured]]:
    """Which of `plans` to take, and what each loses at the unseen length.

    The first, unless another loses less by more than chance, here and at the longest length: the
    extremes of a front lose most at the lengths they gave up. Dense and a uniform plan of as much
    memory as the winner's stand in the table for comparison. The samples are ones that no profile
    has seen.
    """
    with stage("validate"):
        samples = unseen_samples(bench, lengths.unseen)
        rows: list[Measured] = []
        for number, plan in enumerate(plans, start=1):
            rows.append(measure(bench, samples, f"plan {number}", plan))
        rivals = [i for i in range(1, len(plans)) if _better(bench, samples, plans[i], plans[0])]
        if rivals:
            longest = unseen_samples(bench, lengths.profiled[-1])
            rivals = [i for i in rivals if _better(bench, longest, plans[i], plans[0])]
        best = min([0, *rivals], key=lambda i: rows[i].loss)
        rows.append(_uniform_row(bench, samples, plans[best], lengths.unseen))
        rows.append(measure(bench, samples, "dense", None))
    return best, rows


def _uniform_row(
    bench: Workbench, samples: Sequence[CalibrationSample], plan: Plan, length: int
) -> Measured:
    """What every head the same loses in as much memory: of all widths, the one that loses
    least."""
    kv, lengths = bench.layout.kv, (length,)
    plans = (
        [matching_uniform(plan, lengths=lengths)]
        if kv is None
        else matching_uniforms(plan, lengths=lengths, kv=kv)
    )
    rows = [measure(bench, samples, "uniform", one) for one in plans]
    return min(rows, key=lambda row: row.loss)


def _better(
    bench: Workbench, samples: Sequence[CalibrationSample], plan: Plan, other: Plan
) -> bool:
    """Whether `plan` loses less than `other` on these samples, by more than chance (95 %)."""
    gains = [sample_loss(bench, s, other) - sample_loss(bench, s, plan) for s in samples]
    error = float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    return float(np.mean(gains)) > student(len(gains) - 1) * error


def unseen_samples(bench: Workbench, length: int) -> list[CalibrationSample]:
    """Samples of `length` tokens that no profile has seen."""
    counts = {length: dict.fromkeys(MEASURED_KINDS, VALIDATION_SAMPLES)}
    return _samples(bench, counts, bench.request.seed + _UNSEEN_SEED)


def measure(
    bench: Workbench, samples: Sequence[CalibrationSample], name: str, plan: Plan | None
) -> Measured:
    """Run `plan` (None: the dense model) on every sample; what was run before is not again."""
    losses: dict[str, list[float]] = {}
    for sample in samples:
        losses.setdefault(sample.domain, []).append(sample_loss(bench, sample, plan))
    return Measured(name, {domain: float(np.mean(found)) for domain, found in losses.items()})


def _samples(
    bench: Workbench, counts: Mapping[int, Mapping[str, int]], seed: int
) -> list[CalibrationSample]:
    """By length, ascending; made in the other order, so that the time left is soon known."""
    made = {
        (length, domain): _domain_samples(bench, length, domain, count, seed)
        for length in sorted(counts, reverse=True)
        for domain, count in counts[length].items()
    }
    groups = [made[length, domain] for length in sorted(counts) for domain in counts[length]]
    return [sample for group in groups for sample in group]


def _domain_samples(
    bench: Workbench, length: int, domain: str, count: int, seed: int
) -> list[CalibrationSample]:
    name = bench.key(
        "calibration",
        stage="calibrate",
        reader=bench.reader.runs,
        length=length,
        domain=domain,
        count=count,
        seed=seed,
    )
    kept = bench.workspace.load_json("calibration", name)
    work = count * bench.costs.answer(domain, length)
    if kept is None:
        with step(Kind.ANSWER, work) as part:
            made = build_calibration(
                bench.reader,
                bench.tokenizer,
                samples_per_length={length: count},
                domains=(domain,),
                seed=seed,
                progress=part,
            )
        kept = [asdict(sample) for sample in made]
        bench.workspace.save_json("calibration", name, kept)
    else:
        passed(Kind.ANSWER, work)
    return [_sample(data) for data in kept]


def _users_own(bench: Workbench, lengths: Sequence[int]) -> list[CalibrationSample]:
    path = bench.request.calibration
    lines = read_calibration(path) if path is not None else []
    name = bench.key(
        "calibration",
        stage="user",
        reader=bench.reader.runs,
        lines=[asdict(line) for line in lines],
        lengths=list(lengths),
    )
    kept = bench.workspace.load_json("calibration", name)
    if kept is None:
        unanswered = sum(line.response is None for line in lines)
        work = unanswered * bench.costs.answer("user", lengths[-1])
        with step(Kind.ANSWER, work) as part:
            made = user_samples(
                lines, bench.reader, bench.tokenizer, lengths=lengths, progress=part
            )
        kept = [asdict(sample) for sample in made]
        bench.workspace.save_json("calibration", name, kept)
    return [_sample(data) for data in kept]


def _sample(data: dict[str, Any]) -> CalibrationSample:
    return CalibrationSample(
        domain=data["domain"],
        length=data["length"],
        token_ids=tuple(data["token_ids"]),
        answer_spans=tuple((start, end) for start, end in data["answer_spans"]),
        correct=tuple(data["correct"]),
        values=tuple((start, end) for start, end in data["values"]),
    )


def _sample_table(bench: Workbench, sample: CalibrationSample, around: Plan | None) -> Tensor:
    given: dict[str, Any] = {} if bench.layout.kv is None else {"widths": KV_BITS}
    name = bench.key(
        "profile",
        sample=asdict(sample),
        sink=bench.layout.sink,
        block=bench.layout.block,
        around=None if around is None else around.to_json(),
        **given,
    )
    kept = bench.workspace.load_tensors("profile", name)
    work = bench.costs.backward(len(sample.token_ids))
    if kept is None:
        with step(Kind.BACKWARD, work):
            kept = {
                "influence": sample_influence(
                    bench.model, bench.checkpoint.spec, sample, bench.layout, around, **given
                )
            }
        bench.workspace.save_tensors("profile", name, kept)
        release_memory()
    else:
        passed(Kind.BACKWARD, work)
    return kept["influence"]


def sample_loss(bench: Workbench, sample: CalibrationSample, plan: Plan | None) -> float:
    """The mean loss in nats of a sample's answer tokens under `plan`; None is the dense model."""
    stated = None if plan is None else plan.to_json()
    name = bench.key(
        "loss",
        reader=bench.reader.runs,
        sample=asdict(sample),
        plan=stated,
    )
    kept = bench.workspace.load_json("loss", name)
    length = len(sample.token_ids)
    work = bench.costs.forward(length, 1.0 if plan is None else plan.density(length))
    if kept is None:
        with step(Kind.MEASURE, work):
            kept = bench.reader.answer_loss(sample, plan)
        bench.workspace.save_json("loss", name, kept)
    else:
        passed(Kind.MEASURE, work)
    return float(kept)
