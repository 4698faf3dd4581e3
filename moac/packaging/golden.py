"""Golden prompts: logits of the original model under the plan's masks, by the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moac.attention import REFERENCE, attention
from moac_runtime.golden import GoldenPrompt
from moac_runtime.plan import Plan


@torch.inference_mode()
def reference_logits(
    model: PreTrainedModel, plan: Plan, tokens: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Logits `[len(positions), V]` float32 of the original model under `plan`'s masks.

    The session's capacity is taken to be the number of tokens.
    """
    with attention(model, REFERENCE):
        out = model(
            input_ids=torch.tensor([tokens], device=model.device),
            logits_to_keep=torch.tensor(positions, device=model.device),
            moac_spans=plan.spans(len(tokens)),
            use_cache=False,
        )
    logits: Tensor = out.logits[0].float().cpu()
    return logits


def golden_prompt(model: PreTrainedModel, plan: Plan, tokens: Sequence[int]) -> GoldenPrompt:
    """`tokens` with the logits expected at `checked_positions`, `model` being in float32."""
    positions = checked_positions(len(tokens))
    return GoldenPrompt(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        logits=reference_logits(model, plan, tokens, positions),
        capacity=len(tokens),
    )


def checked_positions(length: int, *, spread: int = 4, last: int = 8) -> list[int]:
    """Some positions all over a sequence and its last ones, ascending."""
    tail = range(max(length - last, 0), length)
    return sorted({length * i // spread for i in range(spread)} | set(tail))
