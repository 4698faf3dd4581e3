"""Samples profiled as `moac plan` profiles them, from its work folder where they stand there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moac.calibration import CalibrationSample
from moac.checkpoint import open_checkpoint
from moac.lengths import Lengths
from moac.pipeline.planner import open_workbench, prepare, sample_counts
from moac.pipeline.stages import Workbench, calibrate, halves, planning_problem, profile, refine
from moac.planning import Problem
from moac.request import CompileRequest

Pairs = Sequence[tuple[CalibrationSample, Tensor]]


@dataclass(frozen=True, slots=True)
class Profiled:
    """`pairs`: samples and their influence, the first `around_dense` around the dense model."""

    bench: Workbench
    lengths: Lengths
    budget: float
    pairs: Pairs
    around_dense: int

    def problem(self, pairs: Pairs) -> Problem:
        """The choice of rules by these of the pairs."""
        samples, tables = [s for s, _ in pairs], [t for _, t in pairs]
        return planning_problem(self.bench, samples, tables, self.lengths, self.budget)


def profiled(model: str, *, budget: float, samples: int, work_dir: Path) -> Profiled:
    """Calibrate, profile around the dense model and then around drafts of the plan."""
    request = CompileRequest(budget=budget, samples=samples)
    checkpoint = open_checkpoint(model)
    lengths, layout = prepare(checkpoint, request)
    bench = open_workbench(checkpoint, layout, request, work_dir)
    first, later = halves(calibrate(bench, sample_counts(lengths, request.measuring.samples)))
    known, tables = refine(bench, first, profile(bench, first), later, lengths, budget)
    return Profiled(bench, lengths, budget, list(zip(known, tables, strict=True)), len(first))
