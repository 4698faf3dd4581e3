"""A plan: one elastic span rule per layer and KV head, and what it costs at a capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moac_runtime.package.limits import MOST_TOKENS
from moac_runtime.package.span import DENSE, HeadSpan, Rule, dense_tokens, head_span


@dataclass(frozen=True, slots=True)
class Plan:
    """Rules in the checkpoint's own order: `rules[layer][kv_head]`.

    `sink`, `block`, `min_span`: tokens. `windows[layer]`: the checkpoint's own sliding window in
    tokens, None where the layer attends fully.
    """

    rules: tuple[tuple[Rule, ...], ...]
    sink: int
    block: int
    min_span: int
    windows: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if not self.rules or not self.rules[0]:
            raise ValueError("rules must name at least one layer and one KV head")
        if len({len(layer) for layer in self.rules}) != 1:
            raise ValueError("rules must have the same number of KV heads in every layer")
        if len(self.windows) != len(self.rules):
            raise ValueError(
                f"windows must have one entry per layer, got {len(self.windows)} "
                f"for {len(self.rules)} layers"
            )
        if self.block < 1 or self.sink < 0:
            raise ValueError(f"block must be >= 1 and sink >= 0, got {self.block}, {self.sink}")
        if self.min_span <= self.sink:
            raise ValueError(f"min_span must exceed sink, got {self.min_span} <= {self.sink}")

    def head(self, layer: int, kv_head: int, capacity: int) -> HeadSpan:
        """The span of one KV head at `capacity` tokens."""
        return head_span(
            self.rules[layer][kv_head],
            capacity,
            sink=self.sink,
            block=self.block,
            min_span=self.min_span,
            window=self.windows[layer],
        )

    def spans(self, capacity: int) -> list[list[HeadSpan]]:
        """Every head's span at `capacity` tokens, `[layers][kv_heads]`."""
        return [
            [self.head(layer, kv_head, capacity) for kv_head in range(len(rules))]
            for layer, rules in enumerate(self.rules)
        ]

    def undropping(self) -> Plan:
        """The plan that drops nothing of the same model."""
        return replace(self, rules=tuple((DENSE,) * len(layer) for layer in self.rules))

    def held_tokens(self, capacity: int) -> int:
        """Tokens held over all layers and KV heads at `capacity` tokens."""
        return sum(head.size for layer in self.spans(capacity) for head in layer)

    def density(self, capacity: int) -> float:
        """KV tokens held, and so bytes, over those that the model holds by itself."""
        return self.held_tokens(capacity) / self.dense_tokens(capacity)

    def dense_tokens(self, capacity: int) -> int:
        """Tokens that the model holds by itself at `capacity` tokens, its own windows counted."""
        return dense_tokens(self.windows, len(self.rules[0]), capacity)

    def to_json(self) -> dict[str, Any]:
        """The keys a reader needs; `plan.json` holds these beside the planning record."""
        return {
            "rules": [[[rule.alpha, rule.beta] for rule in layer] for layer in self.rules],
            "sink": self.sink,
            "block": self.block,
            "min_span": self.min_span,
            "windows": list(self.windows),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_json`; other keys are ignored. Raises KeyError, TypeError, ValueError."""
        return cls(
            rules=tuple(tuple(_rule(rule) for rule in layer) for layer in data["rules"]),
            sink=_tokens(data["sink"], "sink"),
            block=_tokens(data["block"], "block"),
            min_span=_tokens(data["min_span"], "min_span"),
            windows=tuple(None if w is None else _tokens(w, "windows") for w in data["windows"]),
        )


def _rule(found: Any) -> Rule:
    alpha, beta = found
    if type(alpha) is not int or abs(alpha) > MOST_TOKENS:
        raise ValueError(f"alpha of a rule must be a whole number of tokens, got {alpha!r:.40}")
    if type(beta) not in (int, float) or not 0 <= beta <= 1:
        raise ValueError(f"beta of a rule must be a number from 0 to 1, got {beta!r:.40}")
    return Rule(alpha, float(beta))


def _tokens(found: Any, name: str) -> int:
    if type(found) is not int or not 0 <= found <= MOST_TOKENS:
        raise ValueError(f"{name} must be a whole number of tokens, got {found!r:.40}")
    return found


def dense_plan(
    num_layers: int,
    num_kv_heads: int,
    *,
    sink: int,
    block: int,
    min_span: int,
    windows: Sequence[int | None],
) -> Plan:
    """The plan that drops nothing: every head keeps the whole capacity (or the own window)."""
    rules = ((DENSE,) * num_kv_heads,) * num_layers
    return Plan(rules, sink=sink, block=block, min_span=min_span, windows=tuple(windows))
