"""Weights in 4 bits: groups of a row as numbers of 0 to 15 with a scale and an offset.

Rounded to nearest. Scale and offset are those of least squares among a few tries: from the group's
whole range, where the ends are exact, to a narrower one, where the many in the middle are nearer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moac_runtime.package.weight_formats import BLOCK, GROUP, padded_columns

_MOST = 15
_TRIES = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of the range to begin with
_REFITS = 2
_LEAST_SCALE = 1e-30
_ROWS = 1024  # at once


def quantise4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers `[out, padded / 2]` uint8 and scales `[out, 2 padded / 32]` bfloat16 of a weight.

    They lie as `moac_runtime.package.weights` says; columns past `[out, in]` repeat the last one.
    """
    # sums of a group follow how it lies in memory, in their last bits
    parts = [_quantise(rows.float().contiguous()) for rows in weight.split(_ROWS)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def group_scales(weight: Tensor) -> Tensor:
    """The scale of every weight `[out, in]`, float32, as it would be rounded."""
    _, pairs = quantise4(weight)
    return pairs[:, ::2].float().repeat_interleave(GROUP, dim=1)[:, : weight.shape[1]]


def _quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    fill = padded_columns(weight.shape[1]) - weight.shape[1]
    wide = F.pad(weight[:, None], (0, fill), mode="replicate")[:, 0] if fill else weight
    groups = wide.unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2)
    best = _Fit(groups, (high - low) / _MOST, low)
    for share in _TRIES:
        step = (high - low) * share / _MOST
        fit = _Fit(groups, step, (high + low) / 2 - step * _MOST / 2)
        for _ in range(_REFITS):
            fit = _Fit(groups, *fit.least_squares())
            best = best.or_better(fit)
    return _halves(best.numbers), torch.stack((best.scale, best.offset), 2).flatten(1)


class _Fit:
    """Groups `[out, groups, 32]` rounded under a scale and an offset `[out, groups]`."""

    def __init__(self, groups: Tensor, scale: Tensor, offset: Tensor) -> None:
        self.groups = groups
        self.scale = scale.clamp(min=_LEAST_SCALE).to(torch.bfloat16)
        self.offset = offset.to(torch.bfloat16)
        step, start = self.scale.float()[:, :, None], self.offset.float()[:, :, None]
        self.numbers = ((groups - start) / step).round().clamp(0, _MOST)
        self.error = (self.numbers * step + start - groups).square().sum(2)

    def least_squares(self) -> tuple[Tensor, Tensor]:
        """The scale and offset that are nearest to the groups, the numbers as they are."""
        numbers, mean = self.numbers, self.groups.mean(2)
        centred = numbers - numbers.mean(2, keepdim=True)
        spread = centred.square().sum(2)
        slope = (centred * self.groups).sum(2) / spread.clamp(min=1e-12)
        scale = torch.where(spread > 0, slope, self.scale.float())
        return scale, mean - scale * numbers.mean(2)

    def or_better(self, other: _Fit) -> _Fit:
        """Of each group the nearer one."""
        nearer = other.error < self.error
        chosen = _Fit.__new__(_Fit)
        chosen.groups = self.groups
        chosen.numbers = torch.where(nearer[:, :, None], other.numbers, self.numbers)
        for name in ("scale", "offset", "error"):
            setattr(chosen, name, torch.where(nearer, getattr(other, name), getattr(self, name)))
        return chosen


def _halves(numbers: Tensor) -> Tensor:
    """Numbers `[out, groups, 32]` two a byte: a block's first group low, its second high."""
    pairs = numbers.to(torch.uint8).flatten(1).unflatten(1, (-1, 2, BLOCK // 2))
    first, second = pairs.unbind(2)
    return torch.bitwise_or(first, second << 4).flatten(1)
