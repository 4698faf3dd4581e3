"""What an evaluation is asked for, checked before any work."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moac.evaluation.longeval import LONGEVAL_WORDING
from moac.evaluation.methods import BASELINES, OWN, is_plan_file
from moac.evaluation.own_task import read_own_task
from moac.evaluation.ruler import RULER_TASKS, RULER_WORDINGS
from moac.evaluation.sessions import check_backend
from moac.evaluation.text import KINDS
from moac.evaluation.wordings import WORDINGS, WordingKind
from moac.typed import check_seed, check_types
from moac_runtime.errors import UsageError

NLL = "nll"
NLL_PARTS = (NLL_DECODE, NLL_PREFILL) = "nll_decode", "nll_prefill"
RULER = "ruler"
DEFAULT_TASKS = ("passkey", "longeval", RULER, NLL)
TASKS = (*DEFAULT_TASKS, *RULER_TASKS)
BOTH = "both"
TASK_WORDINGS: Mapping[str, tuple[WordingKind, ...]] = {
    "passkey": WORDINGS,
    "longeval": (LONGEVAL_WORDING,),
    **{task: (wording,) for task, wording in RULER_WORDINGS.items()},
}
"""Which wordings the cases of a task come in: calibration's own, or none of them."""

_RESULT_NAMES = {*TASKS, *(f"{RULER}_{task}" for task in RULER_TASKS), *NLL_PARTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """Every choice of an evaluation. `lengths`: tokens, those of prompt and answer together.

    `tasks`: None means all of `DEFAULT_TASKS`, or none where there is a `task`, a JSONL of the
    user's own. `lengths`: None means those that were planned for. `samples`: cases of each task
    and length, half of them in each wording where a task has both; of "nll", windows of each kind
    of text. `against`: baselines and plan.json files beside the package's own plan. `batch`:
    cases run at once. `backend`: cpu (the package's native kernels) or torch, None is the first
    that runs here. `cpu`: the instruction set of those kernels, None is the best here.
    `wording`: "unseen" by calibration, "seen" or "both"; None means both. `text`: kinds of text
    that "nll" reads; None means all. Raises UsageError for values that cannot be meant.
    """

    tasks: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    samples: int = 50
    against: tuple[str, ...] = ("dense", "uniform")
    seed: int = 0
    task: Path | None = None
    batch: int = 8
    backend: str | None = None
    cpu: str | None = None
    wording: str | None = None
    text: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for task in self.names:
            if task not in TASKS:
                raise UsageError(f"there is no task {task!r}; choose from {', '.join(TASKS)}")
        for name in self.against:
            if name not in BASELINES and not is_plan_file(name):
                raise UsageError(
                    f"there is no baseline {name!r}; choose from {', '.join(BASELINES)}, or give "
                    "a plan.json"
                )
        self._check_methods()
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise UsageError("lengths must be positive numbers of tokens, such as 1024,2048")
        for name in ("samples", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected at least 1")
        check_backend(self.backend, self.cpu)
        check_seed(self.seed)
        self._check_wording()
        self._check_text()
        if self.task is not None:
            read_own_task(self.task)  # a bad line is named now, not after minutes
            if self.task.stem in _RESULT_NAMES:
                raise UsageError(
                    f"the task file {self.task} bears the name of the task {self.task.stem}; "
                    "give it another, which its results will carry"
                )

    def _check_methods(self) -> None:
        methods = [OWN, *(Path(n).stem if is_plan_file(n) else n for n in self.against)]
        twice = next((name for name in methods if methods.count(name) > 1), None)
        if twice is not None:
            raise UsageError(
                f"two of the plans to compare bear the name {twice}, which their results carry; "
                "name each once, and give a plan file another name"
            )

    def _check_wording(self) -> None:
        if self.wording not in (None, BOTH, *WORDINGS):
            raise UsageError(
                f"there is no wording {self.wording!r}; choose from {', '.join(WORDINGS)}, {BOTH}"
            )
        if self.wording is None:
            return
        for task in self.tasks or ():
            others = TASK_WORDINGS.get(task, ())
            if others and not self._chosen(task):
                raise UsageError(
                    f"the task {task} has {others[0]} wordings alone; leave it or "
                    f"--wording {self.wording} out"
                )
        if not self.synthetic():
            raise UsageError(
                "--wording chooses among the wordings of tasks such as passkey, and no task asked "
                "for has any; leave it out"
            )

    def _check_text(self) -> None:
        if self.text is None:
            return
        unknown = next((kind for kind in self.text if kind not in KINDS), None)
        if unknown is not None or len(set(self.text)) != len(self.text) or not self.text:
            raise UsageError(
                f"text is {','.join(self.text)!r}, expected some of {','.join(KINDS)}, each once"
            )
        if NLL not in self.names:
            raise UsageError(
                f"--text chooses what the task {NLL} reads, and it is not asked for; leave --text "
                f"out or add {NLL} to --tasks"
            )

    def _chosen(self, task: str) -> tuple[WordingKind, ...]:
        return tuple(kind for kind in TASK_WORDINGS[task] if self.wording in (None, BOTH, kind))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of text that "nll" reads, in the order in which they are shown."""
        return tuple(kind for kind in KINDS if self.text is None or kind in self.text)

    def counts(self, task: str) -> dict[WordingKind, int]:
        """Cases of a synthetic task in each wording; an odd one more is unseen."""
        kinds = self._chosen(task)
        share, more = divmod(self.samples, len(kinds))
        found = {kind: share + (place < more) for place, kind in enumerate(kinds)}
        return {kind: count for kind, count in found.items() if count}

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks to make here, as they were named."""
        if self.tasks is not None:
            return self.tasks
        return () if self.task is not None else DEFAULT_TASKS

    def synthetic(self) -> tuple[str, ...]:
        """The tasks made here that have cases in the wordings asked for, "ruler" spelled out."""
        spelled = [
            name for task in self.names for name in (RULER_TASKS if task == RULER else (task,))
        ]
        return tuple(n for n in dict.fromkeys(spelled) if n != NLL and self._chosen(n))

    def command(self, package: Path, source: str, lengths: tuple[int, ...]) -> str:
        """The command line that repeats this evaluation."""
        words = ["moac", "eval", str(package), "--source", source]
        words += ["--tasks", ",".join(self.names)] if self.names else []
        words += ["--lengths", ",".join(map(str, lengths)), "--samples", str(self.samples)]
        words += ["--against", ",".join(self.against), "--seed", str(self.seed)]
        words += ["--batch", str(self.batch)]
        words += ["--backend", self.backend] if self.backend else []
        words += ["--cpu", self.cpu] if self.cpu else []
        words += ["--wording", self.wording] if self.wording else []
        words += ["--text", ",".join(self.text)] if self.text else []
        return shlex.join([*words, *(["--task", str(self.task)] if self.task else [])])
