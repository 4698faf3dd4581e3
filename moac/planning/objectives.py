"""From influence per sample to one loss table per length, domains weighed against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moac.planning.problem import Floats, Objective, plan_losses
from moac_runtime.package.kv_format import KV_BITS
from moac_runtime.package.plan import Plan

if TYPE_CHECKING:
    from moac.calibration import CalibrationSample


@dataclass(frozen=True, slots=True)
class Counting:
    """How a domain's costs enter the plan, span by span: `weight * (size ** power + gain * mean)`.

    `size`: the root mean square of influence over samples; `mean`: its mean, which has a sign.
    The samples of every other length count too, all of them `lent` as much as the length's own.
    """

    weight: float
    power: int
    gain: float = 0.0
    lent: float = 0.0


ANSWERS = Counting(weight=8.0, power=1, gain=4.0, lent=0.5)
"""Domains whose answers stand at one place: retrieval, and the user's own samples."""

COUNTING: Mapping[str, Counting] = {
    "documents": Counting(weight=0.25, power=2),
    "text": Counting(weight=2.5, power=2),
}
"""Every other domain.

Chosen on SmolLM2 (benchmarks/influence.py): so much that running text loses no more than under a
uniform plan; and what retrieval and text ask for serves documents too.
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

    What rounding adds counts by its square in every domain: its errors have no sign, and so those
    of many heads add up as variances do.
    """
    found = stacked(samples, tables)
    lengths = sorted({sample.length for sample in samples})
    return [_length_objective(n, found, reference) for n in lengths]


def stacked(
    samples: Sequence[CalibrationSample], tables: Sequence[Tensor]
) -> dict[str, dict[int, Floats]]:
    """Influence `[samples, layers, kv_heads, spans]` by domain, then by length, shortest first.

    Where rounding was measured too, `[samples, 1 + widths, layers, kv_heads, spans]`.
    """
    found: dict[str, dict[int, list[Tensor]]] = {}
    for sample, table in zip(samples, tables, strict=True):
        found.setdefault(sample.domain, {}).setdefault(sample.length, []).append(table)
    return {
        domain: {n: torch.stack(group).double().numpy() for n, group in sorted(by_length.items())}
        for domain, by_length in found.items()
    }


def _length_objective(
    length: int,
    found: Mapping[str, Mapping[int, Floats]],
    reference: Plan,
) -> Objective:
    """`found[domain][length]`: influence `[samples, layers, kv_heads, spans]`."""
    counted = [
        (COUNTING.get(domain, ANSWERS), tables)
        for domain, tables in found.items()
        if length in tables
    ]
    weights = [how.weight for how, _ in counted]
    spans = [
        _costs(how, {n: of_spans(found) for n, found in tables.items()}, reference, length)
        for how, tables in counted
    ]
    total: Floats = np.average(spans, axis=0, weights=weights)
    added = [_rounding_costs(tables[length], reference, length) for _, tables in counted]
    rounding = {
        bits: np.average([costs[bits] for costs in added], axis=0, weights=weights)
        for bits in added[0]
    }
    return Objective(name=f"{length}", length=length, table=total, rounding=rounding)


def of_spans(found: Floats) -> Floats:
    """The influence of spans alone, `[samples, layers, kv_heads, spans]`."""
    return found if found.ndim == 4 else found[:, 0]


def of_rounding(found: Floats) -> dict[int | None, Floats]:
    """That of rounding, by width; none where it was not measured."""
    if found.ndim == 4:
        return {}
    return {bits: found[:, place] for place, bits in enumerate(KV_BITS, start=1)}


def _rounding_costs(found: Floats, reference: Plan, length: int) -> dict[int | None, Floats]:
    """`[layers, kv_heads, spans]` of each width, in units of what `reference` loses by squares."""
    squares = monotone(np.square(of_spans(found)).mean(0))
    unit = plan_losses(reference, [Objective("unit", length, squares)])[0] or 1.0
    return {bits: np.square(one).mean(0) / unit for bits, one in of_rounding(found).items()}


def _costs(how: Counting, tables: Mapping[int, Floats], reference: Plan, length: int) -> Floats:
    """`[layers, kv_heads, spans]`, in units of what `reference` loses by the size of influence."""
    pooled = [(1.0, tables[length])]
    if how.lent:
        spans = tables[length].shape[-1]
        pooled += [
            (how.lent, stretched(other, spans, length / n))
            for n, other in tables.items()
            if n != length
        ]
    weights = [weight for weight, _ in pooled]
    squares = np.average([np.square(found).mean(0) for _, found in pooled], 0, weights)
    sizes = monotone(np.sqrt(squares)) ** how.power
    unit = plan_losses(reference, [Objective("unit", length, sizes)])[0]
    costs = sizes
    if how.gain:
        mean = np.average([found.mean(0) for _, found in pooled], 0, weights)
        costs = sizes + how.gain * mean
    return costs / unit if unit > 0 else costs


def stretched(tables: Floats, spans: int, times: float) -> Floats:
    """Influence at a length `times` as long: of a span, what as large a share of the length had.

    `tables[..., spans]`; spans that no plan may take, which are infinite, stand for none.
    """
    finite = int(np.isfinite(tables).reshape(-1, tables.shape[-1]).all(0).argmax())
    places = np.clip(np.rint(np.arange(spans) / times).astype(int), finite, tables.shape[-1] - 1)
    stretched: Floats = tables[..., places]
    return stretched


def monotone(sizes: Floats) -> Floats:
    """A narrower span never counts as cheaper than a wider one of the same head."""
    widest_first = np.maximum.accumulate(sizes[..., ::-1], axis=-1)
    return widest_first[..., ::-1].copy()
