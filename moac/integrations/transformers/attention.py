"""The attention function given to transformers for as long as a plan is attached to some model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from moac.integrations.transformers.forward import ForwardPass
from moac_runtime.errors import UsageError

NAME = "moac_plan"
STEP = "moac_step"
"""The keyword that carries a forward pass's `ForwardPass` down to the attention function."""

_attached: set[int] = set()


def register(number: int) -> None:
    """Make the function known to transformers, for the attached plan of this number."""
    AttentionInterface.register(NAME, _attention)
    _attached.add(number)


def unregister(number: int) -> None:
    """Take the function back when no plan is left that needs it."""
    _attached.discard(number)
    if not _attached:
        # the library has no call that undoes `register`
        AttentionInterface._global_mapping.pop(NAME, None)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    *,
    moac_step: ForwardPass | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """`query` `[B, H, T, D]`, `key` and `value` `[B, K, T, D]`: new ones; `[B, T, H, D]`."""
    if moac_step is None:
        raise UsageError(
            "this layer runs without the model that a plan is attached to; call the attached "
            "model as a whole, and give another model that shares its config object a copy of it"
        )
    if dropout:
        raise UsageError(
            f"the model trains with attention dropout {dropout}, which a plan does not run with; "
            "call model.eval(), or set attention_dropout to 0"
        )
    return moac_step.attend(int(module.layer_idx), query, key, value), None  # type: ignore[arg-type]
