"""The evaluation: tasks by lengths by plans, every one through the packaged runtime."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import click
import torch

from moac.checkpoint import Checkpoint, open_checkpoint
from moac.evaluation.case import Case
from moac.evaluation.kept import KeptCells, Row, library_versions
from moac.evaluation.longeval import longeval
from moac.evaluation.methods import OWN, PlanAt, always, is_plan_file, method_plans
from moac.evaluation.own_task import own_cases, read_own_task
from moac.evaluation.passkey import passkey
from moac.evaluation.request import NLL, NLL_PARTS, RULER, EvalRequest
from moac.evaluation.results import Difference, Evaluation, Outcome, Result, compare, summarise
from moac.evaluation.ruler import RULER_TASKS, ruler
from moac.evaluation.runner import STEPPED, TEXT_STEPPED, Runner, TextLoss
from moac.evaluation.sessions import Sessions, open_sessions
from moac.evaluation.text import MOST_TOKENS, kind_tokens, most_windows, windows
from moac.evaluation.tokenizer import in_transformers, read_tokenizer
from moac.evaluation.wordings import WordingKind
from moac.origin import check_source
from moac.pipeline.plan_file import read_rules
from moac.progress.cost import Costs
from moac.progress.progress import notes, passed, stage, step
from moac.show.inspection import planned_lengths
from moac.store.work_dir import default_work_dir
from moac.store.workspace import Workspace
from moac_runtime.errors import CheckFailed, UsageError
from moac_runtime.package.artifact import Artifact, load_plan_record, open_artifact
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.plan import Plan

Item = TypeVar("Item")
Text = tuple[int, ...]
Measured = dict[tuple[str, int], dict[str, list[Outcome]]]

_PREPARED, _RUN = "tokens", "operations"  # what there is to do, for the time left


@dataclass(frozen=True, slots=True)
class _Cell:
    """The cases (or texts, for the task "nll") of one task at one length.

    `part`: their wording or the kind of text, where figures are told apart by it. Rows of like
    length waste the least, so `cases` stand by length.
    """

    task: str
    length: int
    cases: tuple[Case, ...] = ()
    texts: tuple[Text, ...] = ()
    part: str | None = None

    @classmethod
    def of_cases(
        cls, task: str, length: int, cases: Sequence[Case], part: str | None = None
    ) -> _Cell:
        ordered = sorted(cases, key=lambda case: len(case.prompt))
        return cls(task, length, tuple(ordered), part=part)

    @property
    def size(self) -> int:
        return len(self.cases) or len(self.texts)

    def cost(self, costs: Costs) -> float:
        """Operations of running it under one plan, about."""
        steps = sum(STEPPED + case.limit for case in self.cases) or self.size * TEXT_STEPPED
        return self.size * costs.forward(self.length) + steps * costs.decode()

    def asked(self) -> object:
        """All that is asked, as JSON values: what a cell's results are kept under."""
        cases = [
            [case.prompt, case.gold.tokens, case.gold.scored, case.limit] for case in self.cases
        ]
        return cases or self.texts


def evaluate(
    package: str | Path,
    source: str | Path,
    *,
    request: EvalRequest | None = None,
    work_dir: str | Path | None = None,
) -> Evaluation:
    """Evaluate the package at `package`; `source` is the checkpoint it was compiled from.

    Every method answers the same cases, written with the package's own tokenizer and template, on
    the package's weights and in its dtype. Finished cells are kept in `work_dir` (None:
    `$MOAC_CACHE`, else the user's cache folder), so that an evaluation cut short goes on where it
    stopped. Raises
    UsageError for lengths beyond the capacity or another checkpoint, ArtifactError, and
    CheckFailed where decode steps and prefill disagree on the same text.
    """
    request = request or EvalRequest()
    artifact, checkpoint = open_artifact(package), open_checkpoint(str(source))
    check_source(artifact, checkpoint)
    notes(checkpoint.notes)
    lengths = _lengths(artifact, request)
    plans = _plans(artifact, checkpoint, request.against)
    own = read_tokenizer(artifact)
    tokenizer = in_transformers(own, artifact.spec.vocab_size)
    cells = _cells(request, tokenizer, lengths)
    sessions = open_sessions(artifact, request.backend, request.cpu)
    if sessions.note is not None:
        click.echo(f"note: running on {sessions.runs}: {sessions.note}", err=True)
    root = Path(work_dir) if work_dir is not None else default_work_dir()
    workspace = Workspace(root, checkpoint.name, checkpoint.identity)
    workspace.prepare()
    rig = _Rig(
        artifact,
        Runner(sessions),
        tokenizer,
        own.eos_token_ids,
        KeptCells.of(workspace, artifact, sessions, batch=request.batch),
    )
    measured, kept = _run(rig, cells, plans, request)
    results: list[Result] = []
    differences: list[Difference] = []
    for (task, length), by_method in measured.items():
        for method, outcomes in by_method.items():
            results += summarise(task, length, method, outcomes)
        differences += compare(task, length, by_method)
    if kept:
        total = len(cells) * len(plans)
        click.echo(f"note: {kept} of {total} cells were kept from an earlier run", err=True)
    return Evaluation(
        results=tuple(results),
        differences=tuple(differences),
        outcomes=measured,
        density={name: {n: plan(n).density(n) for n in lengths} for name, plan in plans.items()},
        record={
            **_record(
                artifact, sessions, request, request.command(Path(package), str(source), lengths)
            ),
            "cells": {"all": len(cells) * len(plans), "kept": kept},
        },
    )


def _plans(
    artifact: Artifact, checkpoint: Checkpoint, against: Sequence[str]
) -> dict[str, PlanAt]:
    """The plans to compare, in the order they were named; a plan file under its file's name."""
    baselines = method_plans(artifact, [name for name in against if not is_plan_file(name)])
    made = {OWN: baselines[OWN]}
    for name in against:
        if is_plan_file(name):
            made[Path(name).stem] = always(read_rules(Path(name), checkpoint))
        else:
            made[name] = baselines[name]
    return made


def _lengths(artifact: Artifact, request: EvalRequest) -> tuple[int, ...]:
    """The lengths asked for, or those the package was planned for; raises UsageError."""
    planned = [n for n in planned_lengths(load_plan_record(artifact)) if n <= artifact.capacity]
    lengths = tuple(sorted(set(request.lengths or planned)))
    if max(lengths) > artifact.capacity:
        raise UsageError(
            f"the length {max(lengths)} is beyond the package's capacity of {artifact.capacity} "
            "tokens; evaluate at shorter lengths, or compile with a larger --capacity"
        )
    return lengths


def _cells(request: EvalRequest, tokenizer: Any, lengths: Sequence[int]) -> list[_Cell]:
    counts = [
        (task, wording, count)
        for task in request.synthetic()
        for wording, count in request.counts(task).items()
    ]
    cells: list[_Cell] = []
    tokens = sum(lengths) * sum(count for *_, count in counts)
    with stage("prepare", {_PREPARED: tokens}):
        for length in lengths:
            for task, wording, count in counts:
                with step(_PREPARED, count * length):
                    cases = _task_cases(request, tokenizer, task, length, wording, count)
                cells.append(_Cell.of_cases(task, length, cases, wording))
    if NLL in request.names:
        cells += _text_cells(request, tokenizer, lengths)
    if request.task is not None:
        lines = read_own_task(request.task)
        by_length = own_cases(lines, tokenizer, lengths=lengths)
        name = request.task.stem
        cells += [_Cell.of_cases(name, n, cases) for n, cases in sorted(by_length.items())]
    return cells


def _task_cases(
    request: EvalRequest,
    tokenizer: Any,
    task: str,
    length: int,
    wording: WordingKind,
    count: int,
) -> list[Case]:
    """`count` cases whose answers stand at depths spread evenly over the haystack."""
    made: dict[str, Callable[..., Case]] = {
        "passkey": partial(passkey, wording=wording),
        "longeval": longeval,
    }
    make = made[task] if task in made else partial(_ruler_case, task)
    return [make(tokenizer, length, request.seed, i, (i + 0.5) / count) for i in range(count)]


def _ruler_case(
    task: str, tokenizer: Any, length: int, seed: int, index: int, depth: float
) -> Case:
    return ruler(tokenizer, task, length, seed, index, depth)


def _text_cells(request: EvalRequest, tokenizer: Any, lengths: Sequence[int]) -> list[_Cell]:
    """Windows of each kind of held-out text, behind what the tokenizer puts before a sequence."""
    opening = tuple(tokenizer("")["input_ids"])
    tokens = {kind: kind_tokens(tokenizer, kind) for kind in request.kinds}
    cells = []
    for length in lengths:
        room = length - len(opening)
        for kind, found in tokens.items():
            count = _num_windows(request, kind, len(found), room, length)
            texts = [(*opening, *w) for w in windows(found, room, count, request.seed)]
            cells.append(_Cell(NLL, length, texts=tuple(texts), part=kind))
    return cells


def _num_windows(request: EvalRequest, kind: str, num_tokens: int, room: int, length: int) -> int:
    """`samples`, or as many windows as a figure reads, and a line that says so."""
    most = most_windows(num_tokens, room)
    if request.samples > most:
        click.echo(
            f"note: nll reads {most} windows of {length} tokens of {kind} where {request.samples} "
            f"were asked for: windows do not overlap, and a figure reads at most {MOST_TOKENS} "
            "tokens of a kind",
            err=True,
        )
    return min(request.samples, most)


@dataclass(frozen=True, slots=True)
class _Rig:
    artifact: Artifact
    runner: Runner
    tokenizer: Any
    eos: frozenset[int]
    kept: KeptCells

    @property
    def costs(self) -> Costs:
        return Costs(self.artifact.spec, DTYPE_BYTES[self.artifact.dtype])


def _run(
    rig: _Rig,
    cells: Sequence[_Cell],
    plans: dict[str, PlanAt],
    request: EvalRequest,
) -> tuple[Measured, int]:
    """The outcomes, and how many cells were kept from an earlier run."""
    kept = 0
    measured: Measured = {}
    work = len(plans) * sum(cell.cost(rig.costs) for cell in cells)
    with stage("evaluate", {_RUN: work}):
        for cell in cells:
            for method, plan in plans.items():
                rows, old = _kept_rows(rig, cell, plan, request)
                kept += old
                for task, outcome in _outcomes(rig.artifact, cell, rows):
                    for name, counted in _counted(task, outcome, request):
                        found = measured.setdefault((name, cell.length), {})
                        found.setdefault(method, []).append(counted)
    return measured, kept


def _counted(task: str, outcome: Outcome, request: EvalRequest) -> Iterator[tuple[str, Outcome]]:
    """The names an outcome counts under: RULER's tasks by their own and, asked for, as a whole."""
    if task not in RULER_TASKS:
        yield task, outcome
        return
    yield f"{RULER}_{task}", outcome
    if RULER in request.names:
        yield RULER, _undeep(outcome)


def _undeep(outcome: Outcome) -> Outcome:
    return Outcome(outcome.score, outcome.nll, part=outcome.part)


def _kept_rows(
    rig: _Rig, cell: _Cell, plan: PlanAt, request: EvalRequest
) -> tuple[list[Row], bool]:
    """The rows of a cell under a plan, and whether they were there already."""
    name = rig.kept.key(
        plan(cell.length),
        asked=cell.asked(),
        task=cell.task,
        part=cell.part,
        length=cell.length,
        seed=request.seed,
        eos=sorted(rig.eos),
    )
    found = rig.kept.load(name)
    cost = cell.cost(rig.costs)
    if found is not None:
        passed(_RUN, cost)
        return found, True
    rows: list[Row] = []
    measure = _text_rows if cell.texts else _case_rows
    batches = -(-cell.size // request.batch)
    with step(_RUN, cost) as part:
        runs = measure(rig, cell, plan(cell.length), request.batch)
        for done, batch in enumerate(runs, start=1):
            rows += batch
            part(done, batches)
    rig.kept.save(name, rows)
    return rows, False


def _case_rows(rig: _Rig, cell: _Cell, plan: Plan, size: int) -> Iterator[list[Row]]:
    """Score and NLL of each case, a batch at a time."""
    for cases in _batches(cell.cases, size):
        replies = rig.runner.replies(plan, cases, capacity=cell.length, eos=rig.eos)
        said = [
            rig.tokenizer.decode(list(reply.tokens), skip_special_tokens=True) for reply in replies
        ]
        yield [
            (case.score(text), reply.nll)
            for case, reply, text in zip(cases, replies, said, strict=True)
        ]


def _text_rows(rig: _Rig, cell: _Cell, plan: Plan, size: int) -> Iterator[list[Row]]:
    """The fields of each text's `TextLoss`, a batch at a time."""
    for texts in _batches(cell.texts, size):
        yield [astuple(loss) for loss in rig.runner.text_losses(plan, texts)]


def _outcomes(
    artifact: Artifact, cell: _Cell, rows: Sequence[Row]
) -> Iterator[tuple[str, Outcome]]:
    """What each row gave, with the task it counts for.

    "nll" is the whole text by prefill, "nll_decode" its last tokens by decode steps, and
    "nll_prefill" the same last tokens by prefill. Raises CheckFailed where these two disagree.
    """
    if not cell.texts:
        for case, (score, nll) in zip(cell.cases, rows, strict=True):
            yield cell.task, Outcome(score, nll, case.depth, cell.part)
        return
    losses = [TextLoss(whole, step, same, int(n)) for whole, step, same, n in rows]
    _check_agreement(artifact, cell.length, losses)
    for loss in losses:
        told = (loss.whole, loss.stepped, loss.same_by_prefill)
        for name, nll in zip((NLL, *NLL_PARTS), told, strict=True):
            yield name, Outcome(None, nll, part=cell.part)


def _check_agreement(artifact: Artifact, length: int, losses: Sequence[TextLoss]) -> None:
    """Raise CheckFailed where decode steps lose more or less than prefill on the same tokens.

    A token's NLL may differ by twice the logits' limit; roundings of a dtype are independent, so
    that of a mean shrinks with the root of the count, down to what reordered sums explain.
    """
    tokens = sum(loss.num_stepped for loss in losses)
    limits = artifact.verification["limits"]
    limit = 2 * (limits["float32"] + limits[artifact.dtype] / math.sqrt(tokens))
    difference = abs(fmean(loss.stepped - loss.same_by_prefill for loss in losses))
    if not difference <= limit:
        raise CheckFailed(
            f"decode steps and prefill disagree by {difference:.3g} nats a token on the same "
            f"{tokens} tokens at length {length}, expected at most {limit:.3g}; run `moac verify` "
            "on the package and report what it says"
        )


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _record(
    artifact: Artifact, sessions: Sessions, request: EvalRequest, command: str
) -> dict[str, Any]:
    return {
        "seed": request.seed,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": "cpu",
            "backend": sessions.backend,
            "runs": sessions.runs,
        },
        "versions": {
            "python": platform.python_version(),
            **library_versions(),
        },
        "package": {
            "identity": artifact.provenance["identity"],
            "dtype": artifact.dtype,
            "capacity": artifact.capacity,
        },
    }
