"""Plans for a benchmark: what each system holds, and random ones of the paper's shape."""

from __future__ import annotations

import random
from collections.abc import Sequence

from moac.planning import candidate_rules
from moac.planning.uniform import uniform_baseline
from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule, span_tokens
from moac_runtime.package.spec import ModelSpec

_ROUNDING = ("moac",)  # whose caches may be narrower than the package's dtype
_SPARSE = ("flex", "onnx")
_SINK, _BLOCK, _MIN_SPAN = 64, 64, 128
_RULES_PER_LAYER = 2  # MoA, arXiv 2406.14909, section 4: at most two distinct rules in a layer
_HALVINGS = 40


def system_plan(system: str, plan: Plan, capacity: int, kv: KvShape) -> Plan:
    """What `system` holds and reads where our own row runs `plan` at `capacity` tokens.

    `kv`: a key as measured, of which a uniform plan holds as many bytes where heads have widths.
    """
    if system in _ROUNDING:
        return plan
    if system in _SPARSE:
        return plan.unrounded()
    if system == "uniform":
        return uniform_baseline(plan, capacity, kv)
    return plan.undropping()


def random_plan(spec: ModelSpec, *, density: float, capacity: int, seed: int) -> Plan:
    """Elastic rules drawn for every KV head, as dense as can be with at most `density`.

    A few heads keep nearly everything and most a little, two rules in a layer. The draw is the
    same for a seed; where even the smallest spans hold more, they are the plan.
    """
    rules = candidate_rules((max(capacity // 2, 1), capacity), block=_BLOCK, min_span=_MIN_SPAN)
    ordered = sorted(rules, key=lambda rule: _span(rule, capacity))
    draws = _draws(spec, seed)

    def plan(skew: float) -> Plan:
        chosen = tuple(tuple(_pick(ordered, draw, skew) for draw in layer) for layer in draws)
        return Plan(
            chosen, sink=_SINK, block=_BLOCK, min_span=_MIN_SPAN, windows=tuple(spec.windows)
        )

    low, high = 0.0, 64.0  # a larger skew makes spans shorter
    if plan(low).density(capacity) <= density:
        return plan(low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = plan(middle).density(capacity) <= density
        low, high = (low, middle) if fits else (middle, high)
    return plan(high)


def _draws(spec: ModelSpec, seed: int) -> list[list[float]]:
    """A number from 0 to 1 for each KV head, `[layers][kv_heads]`, few distinct in a layer."""
    dice = random.Random(seed)
    layers = []
    for _ in range(spec.num_layers):
        choices = [dice.random() for _ in range(_RULES_PER_LAYER)]
        layers.append([dice.choice(choices) for _ in range(spec.num_kv_heads)])
    return layers


def _pick(ordered: Sequence[Rule], draw: float, skew: float) -> Rule:
    return ordered[min(int(draw**skew * len(ordered)), len(ordered) - 1)]


def _span(rule: Rule, capacity: int) -> int:
    return span_tokens(rule, capacity, block=_BLOCK, min_span=_MIN_SPAN)
