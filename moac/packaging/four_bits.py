"""Weights in 4 bits: groups of a row as numbers of 0 to 15 with a scale and an offset.

Scale and offset are those of least squares among a few tries: from the group's whole range, where
the ends are exact, to a narrower one, where the many in the middle are nearer. `nearest` rounds by
them; `feedback.py` rounds with what a layer puts out in view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moac_runtime.package.weight_formats import BLOCK, GROUP, padded_columns

MOST = 15
LEAST_SCALE = 1e-30  # groups of one value have one too
_TRIES = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of the range to begin with
_REFITS = 2
_ROWS = 1024  # at once

WORD = torch.int64
"""The dtype of words, which no weight has."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """A matrix in 4 bits. `numbers` `[out, in]` uint8; `scale`, `offset` `[out, groups]` bfloat16.

    A group is 32 columns, the last one of a row what is left: weight = number x scale + offset.
    """

    numbers: Tensor
    scale: Tensor
    offset: Tensor

    def weight(self) -> Tensor:
        """What it means, `[out, in]` float32."""
        scale, offset = (self._by_column(x.float()) for x in (self.scale, self.offset))
        return self.numbers * scale + offset

    def packed(self) -> tuple[Tensor, Tensor]:
        """Numbers `[out, padded / 2]` uint8 and scales `[out, 2 padded / 32]` bfloat16.

        They lie as `moac_runtime.package.weights` says; columns past `[out, in]` repeat the last.
        """
        columns = padded_columns(self.numbers.shape[1])
        numbers, scale, offset = self.numbers, self.scale, self.offset
        pairs = [_widened(x, columns // GROUP) for x in (scale, offset)]
        return _halves(_widened(numbers, columns)), torch.stack(pairs, 2).flatten(1)

    @classmethod
    def of(cls, numbers: Tensor, scales: Tensor, columns: int) -> Rounded:
        """Back from `packed`."""
        blocks = numbers.unflatten(1, (-1, BLOCK // 2))
        wide = torch.stack((blocks & MOST, blocks >> 4), 2).flatten(1)[:, :columns]
        scale, offset = scales.unflatten(1, (-1, 2)).unbind(2)
        groups = -(-columns // GROUP)
        return cls(wide, scale[:, :groups], offset[:, :groups])

    def words(self) -> Tensor:
        """Every weight as a word `[out, in]` of its own, so that rows and groups may be moved."""
        scale, offset = (self._by_column(_bits(x)) for x in (self.scale, self.offset))
        return self.numbers | scale << 8 | offset << 24

    @classmethod
    def of_words(cls, words: Tensor) -> Rounded:
        """Back from `words`, moved by rows or by whole groups of columns."""
        first = words[:, ::GROUP]
        scale, offset = (_from_bits(first >> shift & 0xFFFF) for shift in (8, 24))
        return cls((words & MOST).to(torch.uint8), scale, offset)

    def _by_column(self, groups: Tensor) -> Tensor:
        return groups.repeat_interleave(GROUP, dim=1)[:, : self.numbers.shape[1]]


def nearest(weight: Tensor) -> Rounded:
    """A weight `[out, in]` rounded to nearest."""
    # sums of a group follow how it lies in memory, in their last bits
    parts = [_nearest(rows.float().contiguous()) for rows in weight.split(_ROWS)]
    of_all = (torch.cat(same) for same in zip(*parts, strict=True))
    return Rounded(*of_all)


def group_scales(weight: Tensor) -> Tensor:
    """The scale of every weight `[out, in]`, float32, as it would be rounded to nearest."""
    scale = nearest(weight).scale.float()
    return scale.repeat_interleave(GROUP, dim=1)[:, : weight.shape[1]]


def fitted(groups: Tensor, importance: Tensor | None = None) -> Fit:
    """The best of the tries for groups `[out, groups, width]`, at most 32 wide.

    `importance` `[width]`: how much each number's squared error counts, the same if left out.
    """
    low, high = groups.aminmax(dim=2)
    weights = groups.new_ones(groups.shape[2]) if importance is None else importance
    best = Fit(groups, weights, (high - low) / MOST, low)
    for share in _TRIES:
        step = (high - low) * share / MOST
        fit = Fit(groups, weights, step, (high + low) / 2 - step * MOST / 2)
        for _ in range(_REFITS):
            fit = Fit(groups, weights, *fit.least_squares())
            best = best.or_better(fit)
    return best


class Fit:
    """Groups `[out, groups, width]` rounded under a bfloat16 scale and offset `[out, groups]`."""

    def __init__(self, groups: Tensor, importance: Tensor, scale: Tensor, offset: Tensor) -> None:
        self.groups, self.importance = groups, importance
        self.scale = scale.clamp(min=LEAST_SCALE).to(torch.bfloat16)
        self.offset = offset.to(torch.bfloat16)
        step, start = self.scale.float()[:, :, None], self.offset.float()[:, :, None]
        self.numbers = ((groups - start) / step).round().clamp(0, MOST)
        self.error = self._sum((self.numbers * step + start - groups).square())

    def least_squares(self) -> tuple[Tensor, Tensor]:
        """The scale and offset that are nearest to the groups, the numbers as they are."""
        count = self.importance.sum()
        mean, middle = self._sum(self.groups) / count, self._sum(self.numbers) / count
        centred = self.numbers - middle[:, :, None]
        spread = self._sum(centred.square())
        slope = self._sum(centred * self.groups) / spread.clamp(min=1e-12 * count)
        scale = torch.where(spread > 0, slope, self.scale.float())
        return scale, mean - scale * middle

    def or_better(self, other: Fit) -> Fit:
        """Of each group the nearer one."""
        nearer = other.error < self.error
        chosen = Fit.__new__(Fit)
        chosen.groups, chosen.importance = self.groups, self.importance
        chosen.numbers = torch.where(nearer[:, :, None], other.numbers, self.numbers)
        for name in ("scale", "offset", "error"):
            setattr(chosen, name, torch.where(nearer, getattr(other, name), getattr(self, name)))
        return chosen

    def _sum(self, values: Tensor) -> Tensor:
        return (values * self.importance).sum(2)


def _nearest(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    columns = weight.shape[1]
    wide = _widened(weight, -(-columns // GROUP) * GROUP)
    fit = fitted(wide.unflatten(1, (-1, GROUP)))
    return fit.numbers.to(torch.uint8).flatten(1)[:, :columns], fit.scale, fit.offset


def _widened(x: Tensor, columns: int) -> Tensor:
    """`x` `[out, in]` with its last column repeated up to `columns`."""
    fill = x[:, -1:].expand(-1, columns - x.shape[1])
    return torch.cat((x, fill), 1)


def _halves(numbers: Tensor) -> Tensor:
    """Numbers `[out, padded]` two a byte: a block's first group low, its second high."""
    first, second = numbers.unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return torch.bitwise_or(first, second << 4).flatten(1)


def _bits(x: Tensor) -> Tensor:
    """The bits of bfloat16 numbers, int64 of 0 to 65535."""
    return x.view(torch.int16).to(torch.int64) & 0xFFFF


def _from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).to(torch.int16).view(torch.bfloat16)
