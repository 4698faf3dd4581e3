"""A matrix in 4 bits, rounded so that what its layer puts out changes least.

GPTQ (arXiv 2210.17323): columns are rounded one after another, and the error of each is made good
in those still to come, as the Hessian of the layer's inputs says. Then numbers, scales and offsets
are gone through again group by group, each set where the output's error is least while all others
stay (coordinate descent), so that it never grows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moac.packaging.four_bits import LEAST_SCALE, MOST, Rounded, fitted
from moac_runtime.package.weight_formats import GROUP

SWEEPS = 4
"""How often numbers and scales are gone through after the first rounding."""

_DAMPING = 0.01  # of the mean diagonal: directions that calibration did not show count as well
_SINGULAR = 1e-6  # a group whose numbers are all but equal has no scale of its own


def damped(hessian: Tensor) -> Tensor:
    """The Hessian with a little of its mean diagonal added, so that it can be inverted."""
    mean = hessian.diagonal().mean()
    return hessian + torch.eye(len(hessian)) * (_DAMPING * mean).clamp(min=1e-20)


@torch.no_grad()
def with_feedback(weight: Tensor, hessian: Tensor, *, sweeps: int = SWEEPS) -> Rounded:
    """The float32 `weight` `[out, in]` in 4 bits. `hessian` `[in, in]`: sum of `x x^T`, damped.

    Needs as many operations as `2 out in^2` for the first rounding and for each of the sweeps.
    """
    state = _State(weight)
    state.round(hessian)
    for _ in range(sweeps):
        state.sweep(hessian)
    return state.rounded()


class _State:
    """A matrix while it is rounded, one column in a row of memory: `[in, out]`.

    `scale`, `offset` `[groups, out]`: float32 of values that bfloat16 holds. `error`: the weight
    less what it is rounded to.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.T.contiguous()
        self.numbers = torch.zeros_like(self.weight)
        self.error = torch.zeros_like(self.weight)
        starts = [*range(0, len(self.weight), GROUP), len(self.weight)]
        self.groups = [slice(*ends) for ends in pairwise(starts)]
        self.scale = self.weight.new_zeros(len(self.groups), self.weight.shape[1])
        self.offset = torch.zeros_like(self.scale)

    def rounded(self) -> Rounded:
        numbers = self.numbers.T.to(torch.uint8).contiguous()
        scale, offset = (x.T.to(torch.bfloat16).contiguous() for x in (self.scale, self.offset))
        return Rounded(numbers, scale, offset)

    def round(self, hessian: Tensor) -> None:
        """Column by column, those that count most first, and whole groups at a time."""
        counts = hessian.diagonal()
        order = self._order(counts)
        columns = torch.cat([own for _, own in order])
        factor = _inverse_factor(hessian[columns][:, columns])
        left, first = self.weight[columns], 0
        for group, own in order:
            last = first + len(own)
            fit = fitted(left[first:last].T.contiguous()[:, None], counts[own])
            self.scale[group], self.offset[group] = (
                fit.scale[:, 0].float(),
                fit.offset[:, 0].float(),
            )
            within, after = factor[first:last, first:last], factor[first:last, last:]
            errors = self._round_group(group, own, left[first:last], within)
            left[last:].addmm_(after.T, errors, alpha=-1)
            first = last
        self.error = self.weight - self._value()

    def _order(self, counts: Tensor) -> list[tuple[int, Tensor]]:
        """Each group and its columns, both by how much they count."""
        of_groups = torch.stack([counts[own].mean() for own in self.groups])
        ordered = of_groups.argsort(descending=True, stable=True).tolist()
        places = torch.arange(len(counts))
        return [
            (group, places[own][counts[own].argsort(descending=True, stable=True)])
            for group, own in ((group, self.groups[group]) for group in ordered)
        ]

    def _round_group(self, group: int, columns: Tensor, left: Tensor, factor: Tensor) -> Tensor:
        """Round what is left of a group's columns; the errors to make good, `[width, out]`."""
        scale, offset = self.scale[group], self.offset[group]
        errors = torch.empty_like(left)
        for place, column in enumerate(columns.tolist()):
            number = ((left[place] - offset) / scale).round_().clamp_(0, MOST)
            self.numbers[column] = number
            errors[place] = (left[place] - number * scale - offset) / factor[place, place]
            left[place + 1 :].addr_(factor[place, place + 1 :], errors[place], alpha=-1)
        return errors

    def sweep(self, hessian: Tensor) -> None:
        """Go once through all groups; the output's error does not grow."""
        for group, own in enumerate(self.groups):
            within, slope = hessian[own, own], hessian[own] @ self.error
            self._refit(group, own, within, slope)
            self._renumber(group, own, within, slope)

    def _refit(self, group: int, own: slice, within: Tensor, slope: Tensor) -> None:
        """The scale and offset of a group that are best for its numbers, where that is less."""
        numbers, scale, offset = self.numbers[own], self.scale[group], self.offset[group]
        through = within @ numbers
        a, b, c = (numbers * through).sum(0), through.sum(0), within.sum()
        d, e, determinant = (slope * numbers).sum(0), slope.sum(0), a * c - b * b
        solved = determinant > _SINGULAR * a * c
        determinant = torch.where(solved, determinant, 1)
        by_scale, by_offset = (d * c - e * b) / determinant, (a * e - b * d) / determinant
        new_scale = _as_stored((scale + by_scale).clamp(min=LEAST_SCALE))
        new_offset = _as_stored(offset + by_offset)
        change = (scale - new_scale) * numbers + (offset - new_offset)
        growth = (change * (2 * slope + within @ change)).sum(0)
        taken = solved & (growth < 0)
        self.scale[group] = torch.where(taken, new_scale, scale)
        self.offset[group] = torch.where(taken, new_offset, offset)
        change *= taken
        self.error[own] += change
        slope += within @ change

    def _renumber(self, group: int, own: slice, within: Tensor, slope: Tensor) -> None:
        """Every number of a group where it is best while all others stay."""
        scale = self.scale[group]
        for place, column in enumerate(range(own.start, own.stop)):
            number = self.numbers[column]
            best = number + slope[place] / (within[place, place] * scale)
            change = (number - best.round_().clamp_(0, MOST)) * scale
            self.numbers[column] = best
            self.error[column] += change
            slope.addr_(within[:, place], change)

    def _value(self) -> Tensor:
        """What the numbers mean, `[in, out]`."""
        places = torch.arange(len(self.weight)) // GROUP
        return self.numbers * self.scale[places] + self.offset[places]


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper factor `U` of the inverse, `U^T U`."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _as_stored(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()
