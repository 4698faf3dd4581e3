"""Small plans, whose spans turn over within some dozen tokens, and tokens to read under them."""

from __future__ import annotations

import torch
from families import VOCAB

from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule

SINK, BLOCK, MIN_SPAN = 4, 8, 8


def plan_of(*layers: tuple[Rule, ...], windows: tuple[int | None, ...] | None = None) -> Plan:
    """A plan of these rules; `windows`: the layers' own, None for none at all."""
    return Plan(
        layers,
        sink=SINK,
        block=BLOCK,
        min_span=MIN_SPAN,
        windows=windows or (None,) * len(layers),
    )


# at 64 tokens: spans 16, 64 / 8 (the least), 32
MIXED = plan_of((Rule(0, 0.25), DENSE), (Rule(-8, 0.125), Rule(0, 0.5)))


def text(count: int, seed: int = 0) -> list[int]:
    """Random tokens, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()
