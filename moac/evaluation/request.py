"""What an evaluation is asked for, checked before any work."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from moac.evaluation.methods import BASELINES
from moac.evaluation.own_task import read_own_task
from moac.evaluation.ruler import RULER_TASKS
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
    and length. `against`: baselines beside the package's own plan. `batch`: cases run at once.
    Raises UsageError for values that cannot be meant.
    """

    tasks: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    samples: int = 50
    against: tuple[str, ...] = ("dense", "uniform")
    seed: int = 0
    task: Path | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        for task in self.names:
            if task not in TASKS:
                raise UsageError(f"there is no task {task!r}; choose from {', '.join(TASKS)}")
        for name in self.against:
            if name not in BASELINES:
                raise UsageError(
                    f"there is no baseline {name!r}; choose from {', '.join(BASELINES)}"
                )
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise UsageError("lengths must be positive numbers of tokens, such as 1024,2048")
        for name in ("samples", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}, expected 0 or more")
        if self.task is not None:
            read_own_task(self.task)  # a bad line is named now, not after minutes
            if self.task.stem in TASKS:
                raise UsageError(
                    f"the task file {self.task} bears the name of the task {self.task.stem}; "
                    "give it another, which its results will carry"
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
        return shlex.join([*words, *(["--task", str(self.task)] if self.task else [])])
