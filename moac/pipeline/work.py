"""The whole work of a compile or a plan, stage by stage, before any of it is done.

`--dry-run` shows it, and while a compile runs, the time left is what is left of it (`eta.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moac.calibration import MEASURED_KINDS, read_calibration
from moac.calibration.jsonl import UserSample
from moac.checkpoint import Checkpoint
from moac.goal import MaxLoss
from moac.lengths import Lengths
from moac.packaging.cpu_kernels import cpu_obstacle, cpu_sets, unbuilt
from moac.packaging.feedback import SWEEPS
from moac.packaging.golden import INSIDE_TOKENS
from moac.packaging.kernels import cuda_archs
from moac.packaging.rounding import WINDOW_TOKENS, WINDOWS
from moac.pipeline.loss_model import LADDER, most_solves
from moac.pipeline.stages import REHEARSED, VALIDATION_SAMPLES, front_solves
from moac.progress.cost import Costs, Kind
from moac.progress.eta import Amounts, TimeLeft
from moac.request import CompileRequest
from moac_runtime.backends.cpu.library import CPU_TARGETS, runnable_sets
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.spec import ModelSpec

_LIBRARIES_BYTES = 5e8  # importing them takes as long as reading so many
_BYTES_A_SECOND = 2e8
_BUILD_SECONDS = 6.0
_SOLVE_SECONDS = 2e-3  # a KV head
_LIMITED = 4  # times as long takes a solve where layers may use few rules
_NATIVE = 2.0  # times as fast as torch read native kernels
# In passes of the measured dtype: golden logits take float32 and attention without tiles, and a
# check prefill, prefill with decode steps, and often a third with nothing dropped.
_GOLDEN_PASSES, _CHECK_PASSES = 3, 4
_DRAWS = 5  # more of golden logits for weights of fewer bits, and again for activations


@dataclass(frozen=True, slots=True)
class Work:
    """Amounts `stages[stage][kind]` in the order of the stages; `guesses`: seconds a unit."""

    stages: Mapping[str, Amounts]
    guesses: Amounts

    @property
    def seconds(self) -> dict[str, float]:
        """What each stage takes, as guessed."""
        return {
            stage: sum(amount * self.guesses[kind] for kind, amount in amounts.items())
            for stage, amounts in self.stages.items()
        }

    def time_left(self) -> TimeLeft:
        """All of it, to be told from now on."""
        return TimeLeft(self.stages, self.guesses)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What decides how much work there is. `counts[length][domain]`: samples to calibrate with.

    `dtype`: that the model is measured in. `kept`: the work folder, where kernels may lie.
    """

    checkpoint: Checkpoint
    request: CompileRequest
    lengths: Lengths
    counts: Mapping[int, Mapping[str, int]]
    dtype: str
    device: torch.device
    kept: Path

    def plan(self) -> Work:
        """All that `moac plan` does."""
        return self._work({"load": self._load(), **self._planning()})

    def compile(self) -> Work:
        """All that `moac compile` does."""
        return self._work({"load": self._load(), **self._planning(), **self._packaging()})

    def package(self, *, measured: bool) -> Work:
        """All that it does with a plan at hand, `measured` where that was edited."""
        validate = {"validate": self._validate(1, alone=True)} if measured else {}
        return self._work({"load": self._load(), **validate, **self._packaging()})

    @property
    def costs(self) -> Costs:
        """Of steps in the dtype that is measured in."""
        return Costs(self.checkpoint.spec, DTYPE_BYTES[self.dtype])

    @property
    def native(self) -> bool:
        """Whether native kernels read for calibration and measurement."""
        on_cpu = self.device.type == "cpu" and bool(runnable_sets(CPU_TARGETS))
        return on_cpu and cpu_obstacle(self.checkpoint.spec, self.dtype) is None

    @property
    def later(self) -> dict[int, int]:
        """Samples by length that are profiled around a draft of the plan."""
        if isinstance(self.request.goal, MaxLoss):
            return {}
        later = {n: kinds["retrieval"] // 2 for n, kinds in self.counts.items()}
        later[self.lengths.profiled[-1]] += len(self._lines) // 2
        return later

    @property
    def samples(self) -> dict[int, int]:
        """All samples by length; of the user's own none is known, so they count as the longest."""
        found = {n: sum(kinds.values()) for n, kinds in self.counts.items()}
        found[self.lengths.profiled[-1]] += len(self._lines)
        return found

    @property
    def _lines(self) -> list[UserSample]:
        path = self.request.calibration
        return [] if path is None else read_calibration(path)

    def _work(self, stages: Mapping[str, Amounts]) -> Work:
        return Work(stages, self._guesses())

    def _guesses(self) -> dict[str, float]:
        """Seconds a unit of each kind: this machine's speed, and figures of others."""
        spec = self.checkpoint.spec
        second = 1 / measured_rate(spec, self.dtype, self.device)
        reading = second / (_NATIVE if self.native else 1)
        cpu = torch.device("cpu")
        checking = second if self.device == cpu else 1 / measured_rate(spec, "float32", cpu)
        limited = _LIMITED if self.request.rules_per_layer is not None else 1
        return {
            Kind.LOAD: 1 / _BYTES_A_SECOND,
            Kind.BUILD: _BUILD_SECONDS,
            Kind.ANSWER: reading,
            Kind.MEASURE: reading,
            Kind.BACKWARD: second,
            Kind.SOLVE: _SOLVE_SECONDS * spec.num_layers * spec.num_kv_heads * limited,
            Kind.WRITE: 1 / _BYTES_A_SECOND,
            Kind.CHECK: checking,
            Kind.ROUND: checking,
        }

    def _load(self) -> Amounts:
        sets = runnable_sets(CPU_TARGETS)[:1] if self.native else []
        return {
            Kind.LOAD: self.costs.weights + _LIBRARIES_BYTES,
            Kind.BUILD: unbuilt(self.kept, sets),
        }

    def _planning(self) -> dict[str, Amounts]:
        costs, lengths, unseen = self.costs, self.lengths, self.lengths.unseen
        profiled = {n: count - self.later.get(n, 0) for n, count in self.samples.items()}
        unanswered = sum(line.response is None for line in self._lines)
        user = unanswered * costs.answer("user", lengths.profiled[-1])
        made = sum(
            count * costs.answer(domain, n)
            for n, kinds in self.counts.items()
            for domain, count in kinds.items()
        )
        ladder = sum(costs.forward(unseen, density) for density in LADDER)
        drafts = min(self.request.measuring.drafts, sum(self.later.values()))
        refine: Amounts = {Kind.BACKWARD: self._backward(self.later), Kind.SOLVE: drafts}
        bisect: Amounts = {Kind.SOLVE: most_solves()}
        to_a_loss, plans = isinstance(self.request.goal, MaxLoss), self.request.measuring.plans
        solves = 1 + front_solves(plans, len(lengths.profiled)) + plans
        return {
            "rehearse": {
                Kind.BACKWARD: costs.backward(lengths.profiled[0]),
                Kind.MEASURE: costs.forward(unseen),
                Kind.CHECK: costs.forward(REHEARSED) if self.device.type == "cpu" else 0,
            },
            "calibrate": {Kind.ANSWER: made + user},
            "profile": {Kind.BACKWARD: self._backward(profiled)},
            "predict": {
                Kind.ANSWER: self._unseen_answers(),
                Kind.MEASURE: self._measured * (costs.forward(unseen) + ladder),
                Kind.SOLVE: len(LADDER),
            },
            **({"bisect": bisect} if to_a_loss else {"refine": refine}),
            "optimise": {Kind.SOLVE: solves},
            "validate": self._validate(plans, alone=False),
        }

    @property
    def _measured(self) -> int:
        return VALIDATION_SAMPLES * len(MEASURED_KINDS)

    def _backward(self, samples: Mapping[int, int]) -> float:
        return sum(count * self.costs.backward(n) for n, count in samples.items())

    def _unseen_answers(self) -> float:
        answers = (self.costs.answer(kind, self.lengths.unseen) for kind in MEASURED_KINDS)
        return VALIDATION_SAMPLES * sum(answers)

    def _validate(self, plans: int, *, alone: bool) -> Amounts:
        """`plans` and a uniform one; `alone`: nobody has measured the dense model before."""
        costs, unseen = self.costs, self.lengths.unseen
        each = (plans + 1) * costs.forward(unseen, self.request.goal.share)
        if not alone:
            return {Kind.MEASURE: self._measured * each}
        return {
            Kind.ANSWER: self._unseen_answers(),
            Kind.MEASURE: self._measured * (each + costs.forward(unseen)),
        }

    def _packaging(self) -> dict[str, Amounts]:
        request, spec = self.request, self.checkpoint.spec
        dtype, targets = request.dtype or self.checkpoint.dtype, request.targets or ()
        dtypes = len({dtype, "float32"})
        draws = (
            0 if request.weights == "full" else (1 + request.rounds_activations(dtype)) * _DRAWS
        )
        if dtype != "float32" and any(kind.experts is not None for kind in spec.kinds):
            draws += _DRAWS
        sets = cpu_sets(targets)
        first = runnable_sets(CPU_TARGETS)[:1] if self.native else []
        builds = unbuilt(self.kept, [name for name in sets if name not in first])
        runners = dtypes * (1 + len(runnable_sets(targets))) + ("onnx" in targets)
        length = self.lengths.profiled[0]
        golden = self.costs.forward(min(INSIDE_TOKENS, length)) + self.costs.forward(length)
        return {
            "emit": {
                **({Kind.ROUND: self._rounding()} if request.weights == "int4" else {}),
                Kind.WRITE: 2 * Costs(spec, DTYPE_BYTES[dtype]).weights,
                Kind.CHECK: golden * (dtypes + draws) * _GOLDEN_PASSES,
                Kind.BUILD: builds + 3 * len(cuda_archs(targets)),
            },
            "verify": {Kind.CHECK: golden * runners * _CHECK_PASSES},
        }

    def _rounding(self) -> float:
        length = min(WINDOW_TOKENS, self.checkpoint.spec.context)
        return self.costs.rounding(WINDOWS, length, SWEEPS + 1)


def measured_rate(spec: ModelSpec, dtype: str, device: torch.device) -> float:
    """Operations a second of this model's largest product, at 512 rows."""
    kind: torch.dtype = getattr(torch, dtype)
    x = torch.ones(512, spec.hidden_size, dtype=kind, device=device)
    width = max(spec.mlp_widths)
    weight = torch.ones(width, spec.hidden_size, dtype=kind, device=device)
    float((x @ weight.T).float().sum())
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < 0.5:
        float((x @ weight.T)[0, 0])
        count += 1
    # A model's passes reach about half the rate of one product.
    return 2 * x.numel() * width * count / seconds / 2
