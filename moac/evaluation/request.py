"""What an evaluation is asked for, checked before any work."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from moac.evaluation.methods import BASELINES, OWN, is_plan_file
from moac.evaluation.own_task import read_own_task
from moac.evaluation.ruler import RULER_TASKS
from moac.evaluation.sessions import check_backend
from moac.typed import check_seed, check_types
from moac_runtime.errors import UsageError

NLL = "nll"
RULER = "ruler"
DEFAULT_TASKS = ("passkey", "longeval", RULER, NLL)
TASKS = (*DEFAULT_TASKS, *RULER_TASKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """Every choice of an evaluation. `lengths`: tokens, those of prompt and answer together.

    `tasks`: None means all of `DEFAULT_TASKS`, or none where there is a `task`, a JSONL of the
    user's own. `lengths`: None means those that were planned for. `samples`: cases of each task
    and length. `against`: baselines and plan.json files beside the package's own plan. `batch`:
    cases run at once. `backend`: cpu (the package's native kernels) or torch, None is the first
    that runs here. Raises UsageError for values that cannot be meant.
    """

    tasks: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    samples: int = 50
    against: tuple[str, ...] = ("dense", "uniform")
    seed: int = 0
    task: Path | None = None
    batch: int = 8
    backend: str | None = None

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
        check_backend(self.backend)
        check_seed(self.seed)
        if self.task is not None:
            read_own_task(self.task)  # a bad line is named now, not after minutes
            if self.task.stem in TASKS:
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

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks to make here, as they were named."""
        if self.tasks is not None:
            return self.tasks
        return () if self.task is not None else DEFAULT_TASKS

    def synthetic(self) -> tuple[str, ...]:
        """The tasks made here that have cases: "ruler" spelled out, "nll" left out."""
        spelled = [
            name for task in self.names for name in (RULER_TASKS if task == RULER else (task,))
        ]
        return tuple(dict.fromkeys(name for name in spelled if name != NLL))

    def command(self, package: Path, source: str, lengths: tuple[int, ...]) -> str:
        """The command line that repeats this evaluation."""
        words = ["moac", "eval", str(package), "--source", source]
        words += ["--tasks", ",".join(self.names)] if self.names else []
        words += ["--lengths", ",".join(map(str, lengths)), "--samples", str(self.samples)]
        words += ["--against", ",".join(self.against), "--seed", str(self.seed)]
        words += ["--batch", str(self.batch)]
        words += ["--backend", self.backend] if self.backend else []
        return shlex.join([*words, *(["--task", str(self.task)] if self.task else [])])
