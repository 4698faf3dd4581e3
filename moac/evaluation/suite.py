"""The evaluation: tasks by lengths by plans, every one through the packaged runtime."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import click
import torch

from moac.calibration import plain_text_windows
from moac.checkpoint import Checkpoint, open_checkpoint
from moac.evaluation.case import Case
from moac.evaluation.longeval import longeval
from moac.evaluation.methods import OWN, PlanAt, always, is_plan_file, method_plans
from moac.evaluation.own_task import own_cases, read_own_task
from moac.evaluation.passkey import passkey
from moac.evaluation.request import NLL, RULER, EvalRequest
from moac.evaluation.results import Difference, Evaluation, Outcome, Result, compare, summarise
from moac.evaluation.ruler import RULER_TASKS, ruler
from moac.evaluation.runner import Runner, TextLoss
from moac.evaluation.sessions import Sessions, open_sessions
from moac.evaluation.tokenizer import in_transformers, read_tokenizer
from moac.inspection import planned_lengths
from moac.origin import check_source
from moac.plan_file import read_plan_file
from moac.progress import Advance, notes, stage
from moac.request import CompileRequest
from moac_runtime.artifact import Artifact, load_plan_record, open_artifact
from moac_runtime.errors import CheckFailed, UsageError

Item = TypeVar("Item")
Text = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Cell:
    """The cases (or texts, for the task "nll") of one task at one length."""

    task: str
    length: int
    cases: tuple[Case, ...] = ()
    texts: tuple[Text, ...] = ()

    @property
    def size(self) -> int:
        return len(self.cases) or len(self.texts)


def evaluate(
    package: str | Path, source: str | Path, *, request: EvalRequest | None = None
) -> Evaluation:
    """Evaluate the package at `package`; `source` is the checkpoint it was compiled from.

    Every method answers the same cases, written with the package's own tokenizer and template, on
    the package's weights and in its dtype. Raises
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
    with stage("prepare") as advance:
        cells = _cells(request, tokenizer, lengths, advance)
    sessions = open_sessions(artifact, request.backend)
    if sessions.note is not None:
        click.echo(f"note: running on {sessions.runs}: {sessions.note}", err=True)
    bench = _Bench(artifact, Runner(sessions), tokenizer, own.eos_token_ids)
    with stage("evaluate") as advance:
        results, differences = _run(bench, cells, plans, request, advance)
    return Evaluation(
        results=tuple(results),
        differences=tuple(differences),
        density={name: {n: plan(n).density(n) for n in lengths} for name, plan in plans.items()},
        record=_record(
            artifact, sessions, request, request.command(Path(package), str(source), lengths)
        ),
    )


def _plans(
    artifact: Artifact, checkpoint: Checkpoint, against: Sequence[str]
) -> dict[str, PlanAt]:
    """The plans to compare, in the order they were named; a plan file under its file's name."""
    baselines = method_plans(artifact, [name for name in against if not is_plan_file(name)])
    made = {OWN: baselines[OWN]}
    for name in against:
        if is_plan_file(name):
            found = read_plan_file(Path(name), checkpoint, CompileRequest())
            made[Path(name).stem] = always(found.plan)
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


def _cells(
    request: EvalRequest, tokenizer: Any, lengths: Sequence[int], advance: Advance
) -> list[_Cell]:
    tasks = request.synthetic()
    cells: list[_Cell] = []
    for length in lengths:
        if NLL in request.names:
            cells.append(_Cell(NLL, length, texts=_texts(request, tokenizer, length)))
        for task in tasks:
            cells.append(_Cell(task, length, _task_cases(request, tokenizer, task, length)))
            advance(len(cells), len(lengths) * (len(tasks) + (NLL in request.names)))
    if request.task is not None:
        lines = read_own_task(request.task)
        by_length = own_cases(lines, tokenizer, lengths=lengths)
        name = request.task.stem
        cells += [_Cell(name, n, tuple(cases)) for n, cases in sorted(by_length.items())]
    return cells


def _task_cases(request: EvalRequest, tokenizer: Any, task: str, length: int) -> tuple[Case, ...]:
    """`samples` cases whose answers stand at depths spread evenly over the haystack."""
    made = {"passkey": passkey, "longeval": longeval}
    make = made[task] if task in made else partial(_ruler_case, task)
    count = request.samples
    return tuple(make(tokenizer, length, request.seed, i, (i + 0.5) / count) for i in range(count))


def _ruler_case(
    task: str, tokenizer: Any, length: int, seed: int, index: int, depth: float
) -> Case:
    return ruler(tokenizer, task, length, seed, index, depth)


def _texts(request: EvalRequest, tokenizer: Any, length: int) -> tuple[Text, ...]:
    """Held-out text, behind what the tokenizer puts before a plain sequence."""
    opening = tuple(tokenizer("")["input_ids"])
    room = length - len(opening)
    windows = plain_text_windows(tokenizer, room, request.samples, request.seed)
    return tuple((*opening, *window) for window in windows)


@dataclass(frozen=True, slots=True)
class _Bench:
    artifact: Artifact
    runner: Runner
    tokenizer: Any
    eos: frozenset[int]


def _run(
    bench: _Bench,
    cells: Sequence[_Cell],
    plans: dict[str, PlanAt],
    request: EvalRequest,
    advance: Advance,
) -> tuple[list[Result], list[Difference]]:
    total, done = len(plans) * sum(cell.size for cell in cells), 0
    measured: dict[tuple[str, int], dict[str, list[Outcome]]] = {}
    for cell in cells:
        for method, plan in plans.items():
            for size, found in _outcomes(bench, cell, plan, request.batch):
                done += size
                advance(done, total)
                for task, outcome in found:
                    for name, counted in _counted(task, outcome, request):
                        rows = measured.setdefault((name, cell.length), {})
                        rows.setdefault(method, []).append(counted)
    results: list[Result] = []
    differences: list[Difference] = []
    for (task, length), by_method in measured.items():
        for method, outcomes in by_method.items():
            results += summarise(task, length, method, outcomes)
        differences += compare(task, length, by_method)
    return results, differences


def _counted(task: str, outcome: Outcome, request: EvalRequest) -> Iterator[tuple[str, Outcome]]:
    """The names an outcome counts under: RULER's tasks by their own and, asked for, as a whole."""
    if task not in RULER_TASKS:
        yield task, outcome
        return
    yield f"{RULER}_{task}", outcome
    if RULER in request.names:
        yield RULER, _undeep(outcome)


def _undeep(outcome: Outcome) -> Outcome:
    return Outcome(outcome.score, outcome.nll)


def _outcomes(
    bench: _Bench, cell: _Cell, plan: PlanAt, batch: int
) -> Iterator[tuple[int, list[tuple[str, Outcome]]]]:
    """How many cases a batch held, and what each gave, with the task it counts for."""
    if cell.texts:
        yield from _text_outcomes(bench, cell, plan, batch)
        return
    # Rows of like length waste the least; the order of results is of no account.
    cases = sorted(cell.cases, key=lambda case: len(case.prompt))
    for rows in _batches(cases, batch):
        replies = bench.runner.replies(
            plan(cell.length), rows, capacity=cell.length, eos=bench.eos
        )
        found = []
        for case, reply in zip(rows, replies, strict=True):
            said = bench.tokenizer.decode(list(reply.tokens), skip_special_tokens=True)
            found.append((cell.task, Outcome(case.score(said), reply.nll, case.depth)))
        yield len(rows), found


def _text_outcomes(
    bench: _Bench, cell: _Cell, plan: PlanAt, batch: int
) -> Iterator[tuple[int, list[tuple[str, Outcome]]]]:
    """ "nll" is the whole text by prefill, "nll_decode" its last tokens by decode steps, and
    "nll_prefill" the same last tokens by prefill.
    """
    losses: list[TextLoss] = []
    for rows in _batches(cell.texts, batch):
        found = bench.runner.text_losses(plan(cell.length), rows)
        losses += found
        whole = [(NLL, Outcome(None, loss.whole)) for loss in found]
        stepped = [(f"{NLL}_decode", Outcome(None, loss.stepped)) for loss in found]
        same = [(f"{NLL}_prefill", Outcome(None, loss.same_by_prefill)) for loss in found]
        yield len(rows), [*whole, *stepped, *same]
    _check_agreement(bench.artifact, cell.length, losses)


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
            **{name: version(name) for name in ("moac", "torch", "transformers", "tokenizers")},
        },
        "package": {
            "identity": artifact.provenance["identity"],
            "dtype": artifact.dtype,
            "capacity": artifact.capacity,
        },
    }
