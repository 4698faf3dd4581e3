"""From influence per sample to one loss table per length, domains weighed against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moac.planning.problem import Floats, Objective, plan_losses
from moac_runtime.plan import Plan

if TYPE_CHECKING:
    from moac.calibration import CalibrationSample


DOMAIN_WEIGHTS = {"documents": 0.25, "text": 1.0}
"""How much a domain counts beside answers that stand at one place, which count six times.

Chosen on SmolLM2 (benchmarks/influence.py): so much that running text loses as little as under a
uniform plan; and what retrieval and text ask for serves documents too.
"""

_ANSWERS_WEIGHT = 6.0


def length_objectives(
    samples: Sequence[CalibrationSample], tables: Sequence[Tensor], reference: Plan
) -> list[Objective]:
    """One objective per length: the weighted mean over domains of their losses.

    Each domain counts in units of what `reference` (a uniform plan at the same budget) loses in
    it, so that none drowns another whatever its scale; then by its weight.

    Text and documents count by the square of influence: a divergence from the dense model grows
    with the square, and a plan that cuts all heads a little, as a uniform one does, loses less
    than the sum of first orders says. For answers the square overrates the few heads with large
    effects, whose real losses level off (benchmarks/influence.py compares).
    """
    lengths = sorted({sample.length for sample in samples})
    return [_length_objective(n, samples, tables, reference) for n in lengths]


def _length_objective(
    length: int, samples: Sequence[CalibrationSample], tables: Sequence[Tensor], reference: Plan
) -> Objective:
    domains: dict[str, list[Tensor]] = {}
    for sample, table in zip(samples, tables, strict=True):
        if sample.length == length:
            domains.setdefault(sample.domain, []).append(table)
    parts = [
        _in_units_of(reference, length, _typical(found) ** (2 if domain in DOMAIN_WEIGHTS else 1))
        for domain, found in domains.items()
    ]
    weights = np.array([DOMAIN_WEIGHTS.get(domain, _ANSWERS_WEIGHT) for domain in domains])
    table = sum(part * share for part, share in zip(parts, weights / weights.sum(), strict=True))
    return Objective(name=f"{length}", length=length, table=np.asarray(table))


def _typical(tables: Sequence[Tensor]) -> Floats:
    """What each span costs, `[layers, kv_heads, spans]`: the root mean square over samples.

    Signs average out at the dense model, so they are dropped. A narrower span never counts as
    cheaper than a wider one of the same head.
    """
    typical: Floats = torch.stack(list(tables)).double().square().mean(0).sqrt().numpy()
    widest_first = np.maximum.accumulate(typical[..., ::-1], axis=-1)
    return widest_first[..., ::-1].copy()


def _in_units_of(reference: Plan, length: int, table: Floats) -> Floats:
    unit = plan_losses(reference, [Objective("unit", length, table)])[0]
    return table / unit if unit > 0 else table
