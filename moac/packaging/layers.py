"""A model of the library run layer by layer, on windows of text that are equally long."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Enough(Exception):
    """Raised by a hook that has seen what it waits for."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer, and what it is given beside the residual: the same for all windows."""

    module: nn.Module
    rest: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, x: Tensor) -> Tensor:
        """What it makes of the residual `[1, tokens, hidden]`."""
        out = self.module(x, *self.rest, **self.keywords)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        """What each of its linear modules is given, by name, where the residual is `x`.

        Modules that are given the same have the same tensor.
        """
        found: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
            found[name] = given[0]

        hooks = [
            part.register_forward_pre_hook(partial(keep, name))
            for name, part in self.module.named_modules()
            if isinstance(part, nn.Linear)
        ]
        try:
            self.run(x)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def opened(
    model: PreTrainedModel, layers: nn.Module, windows: Sequence[Sequence[int]]
) -> tuple[list[Layer], list[Tensor]]:
    """The decoder's `layers`, and the residual of every window before the first of them."""
    known: dict[nn.Module, Layer] = {}
    residuals: list[Tensor] = []
    first = next(layers.children())

    def learn(module: nn.Module, rest: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        known[module] = Layer(module, rest[1:], keywords)
        if module is first:
            residuals.append(rest[0])
            if len(residuals) > 1:  # the rest of the model has been seen
                raise _Enough

    hooks = [part.register_forward_pre_hook(learn, with_kwargs=True) for part in layers.children()]
    try:
        for window in windows:
            with suppress(_Enough):
                model(torch.tensor([window]), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return list(known.values()), residuals
