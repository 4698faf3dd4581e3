"""What the claims are measured with: a model, plans of one effort, and how much is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asked import check_lengths
from evaluated import evaluated
from made import UNIFORM, made_package, made_plan, made_uniform, package_path, plan_path
from pooled import Case

from moac.bench.request import BenchRequest
from moac.checkpoint import open_checkpoint
from moac.evaluation import EvalRequest
from moac.evaluation.wordings import UNSEEN
from moac.request import CompileRequest
from moac_runtime.errors import UsageError
from moac_runtime.package.artifact import open_artifact

OURS = "moac"
QUICK: dict[str, Any] = {
    "effort": "quick",
    "budgets": (0.5, 0.25),
    "lengths": (640,),
    "span": 320,
    "stretch": (1.5,),
    "seeds": (0,),
    "cases": 1,
    "suite_lengths": (2048,),
    "suite_cases": 1,
    "texts": 1,
    "context": 56,
    "tokens": 8,
    "repeats": 1,
    "kv_mib": 1,
    "most_rows": 2,
}
"""What is asked of a tiny model, to see that everything runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Lengths, contexts and spans in tokens; the first of `budgets` is the package's.

    `span`: the mean span at which reach is compared; uniform's is tried at `stretch` times that.
    `cases`: pass keys of each length and seed. `kv_mib`: what the KV memory may hold, in MiB.
    `most_rows`: of a batch. `against`: what our throughput stands beside.
    """

    model: str
    effort: str
    budgets: tuple[float, ...]
    lengths: tuple[int, ...]
    span: int
    stretch: tuple[float, ...]
    seeds: tuple[int, ...]
    cases: int
    suite_lengths: tuple[int, ...]
    suite_cases: int
    texts: int
    context: int
    tokens: int
    repeats: int
    kv_mib: int
    most_rows: int
    against: tuple[str, ...]
    again: bool
    work_dir: Path
    planning: Sequence[str]
    packaging: Sequence[str]

    def check(self) -> None:
        """Raise UsageError, before any work, for choices that cannot be."""
        for budget in self.budgets:
            CompileRequest(effort=self.effort, budget=budget)
        for seed in self.seeds:
            EvalRequest(seed=seed, samples=self.cases, lengths=self.lengths)
        EvalRequest(samples=self.suite_cases, lengths=self.suite_lengths)
        EvalRequest(samples=self.texts)
        BenchRequest(
            package=self.package,
            source=self.model,
            against=self.against,
            contexts=(self.context,),
            tokens=self.tokens,
            repeats=self.repeats,
        )
        for name in ("kv_mib", "most_rows"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} must be 1 or more, got {getattr(self, name)}")
        if min(self.stretch) <= 1:
            raise UsageError(
                f"--stretch holds {min(self.stretch):g}, expected numbers above 1: up to the span "
                "itself nothing is dropped"
            )
        check_lengths(
            self.model,
            [
                *(*self.lengths, *self.suite_lengths, *self.reached, *self.stretched),
                self.context + self.tokens,
            ],
        )

    @property
    def package(self) -> Path:
        """The package whose weights everything runs on."""
        return package_path(self.work_dir, self.effort)

    @property
    def reached(self) -> list[int]:
        """The lengths at which plans of the budgets have the mean span, ascending."""
        return sorted(round(self.span / budget) for budget in self.budgets)

    @property
    def stretched(self) -> list[int]:
        """Shorter lengths at which uniform spans of the mean span are tried."""
        return sorted(round(self.span * times) for times in self.stretch)

    def prepare(self, budgets: Sequence[float]) -> None:
        """Make the plans at `budgets` and the package, where they do not stand."""
        for budget in budgets:
            made_plan(
                *(self.model, self.effort, budget),
                work_dir=self.work_dir,
                planning=self.planning,
            )
        made_package(
            *(self.model, self.effort, self.budgets[0]),
            work_dir=self.work_dir,
            packaging=self.packaging,
        )

    def plan(self, budget: float) -> Path:
        """The plan file at a budget."""
        return plan_path(self.work_dir, budget, self.effort)

    def uniform(self, share: float, lengths: Sequence[int], name: str = UNIFORM) -> Path:
        """The plan file of equal spans that hold `share` of each of `lengths`."""
        like = open_artifact(self.package, check="sizes").plan
        path = plan_path(self.work_dir, share, name)
        return made_uniform(open_checkpoint(self.model), like, share, path, lengths=lengths)

    def passkeys(
        self, plans: dict[str, Path], share: float, lengths: Sequence[int]
    ) -> Iterator[Case]:
        """Pass keys in unseen wordings, of every seed."""
        for seed in self.seeds:
            yield from self.evaluated(
                *(plans, share, lengths, seed),
                tasks=("passkey",),
                wording=UNSEEN,
                samples=self.cases,
            )

    def evaluated(
        self, plans: dict[str, Path], share: float, lengths: Sequence[int], seed: int, **asked: Any
    ) -> list[Case]:
        """Cases under dense and `plans`; see `evaluated`."""
        return evaluated(
            *(self.package, self.model, plans),
            budget=share,
            lengths=lengths,
            seed=seed,
            work_dir=self.work_dir,
            **asked,
        )
