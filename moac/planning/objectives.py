"""From influence per sample to one loss table per length, domains weighed against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moac.planning.problem import Floats, Objective, plan_losses
from moac_runtime.plan import Plan

if TYPE_CHECKING:
    from moac.calibration import CalibrationSample


@dataclass(frozen=True, slots=True)
class Counting:
    """How a domain's costs enter the plan, span by span: `weight * (size ** power + gain * mean)`.

    `size`: the root mean square of influence over samples; `mean`: its mean, which has a sign.
    The weight grows with `length ** growth`, from the shortest length on.
    """

    weight: float
    power: int
    gain: float = 0.0
    growth: float = 0.0


ANSWERS = Counting(weight=8.0, power=1, gain=2.0)
"""Domains whose answers stand at one place: retrieval, and the user's own samples."""

COUNTING: Mapping[str, Counting] = {
    "documents": Counting(weight=0.25, power=2),
    "text": Counting(weight=1.0, power=2, growth=0.5),
}
"""Every other domain.

Chosen on SmolLM2 (benchmarks/influence.py): so much that running text loses no more than under a
uniform plan, of which squares tell too much at the shortest length and too little at the longest;
and what retrieval and text ask for serves documents too.
"""


def length_objectives(
    samples: Sequence[CalibrationSample], tables: Sequence[Tensor], reference: Plan
) -> list[Objective]:
    """One objective per length: the weighted mean over domains of their losses.

    Each domain counts in units of what `reference` (a uniform plan at the same budget) loses in
    it, so that none drowns another whatever its scale; then by its weight.

    Text and documents count by the square of influence: a divergence from the dense model grows
    with the square, and a plan that cuts all heads a little, as a uniform one does, loses less
    than the sum of first orders says. For answers the square overrates the few heads with large
    effects, whose real losses level off; and what all answers lose or gain together counts again,
    since heads add up: an answer is lost to many small pushes the same way rather than to one
    (benchmarks/influence.py compares).
    """
    lengths = sorted({sample.length for sample in samples})
    return [_length_objective(n, n / lengths[0], samples, tables, reference) for n in lengths]


def _length_objective(
    length: int,
    times: float,
    samples: Sequence[CalibrationSample],
    tables: Sequence[Tensor],
    reference: Plan,
) -> Objective:
    """`times`: how often the length holds the shortest one."""
    domains: dict[str, list[Tensor]] = {}
    for sample, table in zip(samples, tables, strict=True):
        if sample.length == length:
            domains.setdefault(sample.domain, []).append(table)
    counted = [(COUNTING.get(domain, ANSWERS), found) for domain, found in domains.items()]
    total: Floats = np.average(
        [_costs(how, found, reference, length) for how, found in counted],
        axis=0,
        weights=[how.weight * times**how.growth for how, _ in counted],
    )
    return Objective(name=f"{length}", length=length, table=total)


def _costs(how: Counting, tables: Sequence[Tensor], reference: Plan, length: int) -> Floats:
    """In units of what `reference` loses by the size of influence."""
    sizes = _typical(tables) ** how.power
    unit = plan_losses(reference, [Objective("unit", length, sizes)])[0]
    costs = sizes
    if how.gain:
        costs = sizes + how.gain * torch.stack(list(tables)).double().mean(0).numpy()
    return costs / unit if unit > 0 else costs


def _typical(tables: Sequence[Tensor]) -> Floats:
    """What each span costs, `[layers, kv_heads, spans]`: the root mean square over samples.

    A narrower span never counts as cheaper than a wider one of the same head.
    """
    typical: Floats = torch.stack(list(tables)).double().square().mean(0).sqrt().numpy()
    widest_first = np.maximum.accumulate(typical[..., ::-1], axis=-1)
    return widest_first[..., ::-1].copy()
