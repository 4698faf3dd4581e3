"""Golden prompts: logits of the original model under the plan's masks, by the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moac.checkpoint.families import model_spec
from moac.checkpoint.key_order import key_orders
from moac.packaging.four_bits import Rounded
from moac.packaging.quantise import round_weights
from moac.profiling.hooks import REFERENCE, attention
from moac_runtime.package.golden import GoldenPrompt
from moac_runtime.package.plan import Plan

INSIDE_TOKENS = 64
"""The golden prompt that lies within every span."""


@torch.inference_mode()
def reference_logits(
    model: PreTrainedModel,
    plan: Plan,
    tokens: Sequence[int],
    positions: Sequence[int],
    *,
    seed: int | None = None,
) -> Tensor:
    """Logits `[len(positions), V]` float32 of the original model under `plan`'s masks and widths.

    The session's capacity is taken to be the number of tokens. `seed`: of errors of float32 in
    keys and values before they are rounded, None for none.
    """
    disturbed = None if seed is None else torch.Generator().manual_seed(seed)
    with attention(model, REFERENCE):
        out = model(
            input_ids=torch.tensor([tokens], device=model.device),
            logits_to_keep=torch.tensor(positions, device=model.device),
            moac_spans=plan.spans(len(tokens)),
            moac_key_orders=key_orders(model_spec(model.config)),
            moac_disturbed=disturbed,
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


def expected_prompts(
    model: PreTrainedModel,
    plan: Plan,
    rows: Sequence[Sequence[int]],
    *,
    weights: str,
    rounded: Mapping[str, Rounded] | None = None,
) -> list[GoldenPrompt]:
    """Each row of tokens as a golden prompt of a package that holds `model` in float32.

    For `weights` of int8 or int4 the model's matrices are rounded in place, and its logits from
    before become each prompt's `source`. `rounded`: those that are in 4 bits already.
    """
    prompts = [golden_prompt(model, plan, row) for row in rows]
    if weights == "full":
        return prompts
    round_weights(model, weights, rounded)
    return [
        replace(golden_prompt(model, plan, row), source=prompt.logits)
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def unrounded(prompts: Sequence[GoldenPrompt]) -> list[GoldenPrompt]:
    """The prompts with the logits of the checkpoint itself, of those that have them."""
    return [replace(p, logits=p.source) for p in prompts if p.source is not None]


def largest_error(
    model: PreTrainedModel,
    plan: Plan,
    prompts: Sequence[GoldenPrompt],
    *,
    seed: int | None = None,
) -> float:
    """How far, at most, the logits of `model` are from those of the prompts.

    `seed`: as of `reference_logits`.
    """
    return max(
        float((_logits_of(model, plan, prompt, seed) - prompt.logits).abs().max())
        for prompt in prompts
    )


def _logits_of(
    model: PreTrainedModel, plan: Plan, prompt: GoldenPrompt, seed: int | None
) -> Tensor:
    tokens, positions = prompt.tokens.tolist(), prompt.positions.tolist()
    return reference_logits(model, plan, tokens, positions, seed=seed)


def checked_positions(length: int, *, spread: int = 4, last: int = 8) -> list[int]:
    """Some positions all over a sequence and its last ones, ascending."""
    tail = range(max(length - last, 0), length)
    return sorted({length * i // spread for i in range(spread)} | set(tail))
