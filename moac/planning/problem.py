"""The choice to be made: rules, losses and a budget as arrays, with hopeless choices removed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

from moac_runtime.errors import BudgetError
from moac_runtime.package.kv_format import KV_BITS, KvShape
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule, dense_tokens, head_span

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """What every plan of one compile shares: `sink`, `block` and `min_span` in tokens.

    `windows[layer]`: the checkpoint's own sliding window in tokens, None where it attends fully.
    `kv`: the keys whose bytes memory is counted in; None counts tokens, which is as good where
    every head holds its keys in the package's dtype. `widths`: those that a head may have.
    """

    num_kv_heads: int
    sink: int
    block: int
    min_span: int
    windows: tuple[int | None, ...]
    kv: KvShape | None = None
    widths: tuple[int | None, ...] = (None,)

    def __post_init__(self) -> None:
        if self.kv is None and self.widths != (None,):
            raise ValueError(f"kv must be given to count the bytes of {self.widths} bits")

    @classmethod
    def of(cls, plan: Plan, kv: KvShape | None = None) -> HeadLayout:
        """The layout that `plan` was made for."""
        found = {rule.bits for layer in plan.rules for rule in layer}
        return cls(
            *(len(plan.rules[0]), plan.sink, plan.block, plan.min_span, plan.windows),
            kv=kv,
            widths=tuple(width for width in (None, *KV_BITS) if width in found) if kv else (None,),
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.windows)

    @property
    def num_heads(self) -> int:
        """KV heads over all layers."""
        return self.num_layers * self.num_kv_heads

    def plan(self, rules: Sequence[Sequence[Rule]]) -> Plan:
        """The plan that gives head `h` of layer `l` the rule `rules[l][h]`."""
        return Plan(
            rules=tuple(tuple(layer) for layer in rules),
            sink=self.sink,
            block=self.block,
            min_span=self.min_span,
            windows=self.windows,
        )

    def uniform(self, rule: Rule) -> Plan:
        """The plan that gives every head `rule`."""
        return self.plan(((rule,) * self.num_kv_heads,) * self.num_layers)

    def dense_tokens(self, capacity: int) -> int:
        """Tokens that the model holds by itself, over all heads, at a capacity."""
        return dense_tokens(self.windows, self.num_kv_heads, capacity)

    @property
    def least(self) -> Rule:
        """The rule that holds least."""
        widths = sorted(self.widths, key=lambda bits: self.kv.token_bytes(bits) if self.kv else 0)
        return Rule(self.min_span, 0.0, widths[0])

    @property
    def token_memory(self) -> int:
        """What a token of one head counts in the package's dtype: its bytes, or one token."""
        return 1 if self.kv is None else self.kv.token_bytes()

    def held(self, plan: Plan, capacity: int) -> int:
        """The memory that `plan` holds at a capacity: bytes, or tokens."""
        if self.kv is None:
            return plan.held_tokens(capacity)
        return plan.held_bytes(capacity, self.kv)

    def share(self, plan: Plan, capacity: int) -> float:
        """The same over what the model holds by itself."""
        return self.held(plan, capacity) / (self.dense_tokens(capacity) * self.token_memory)

    def dense_at(self, capacities: Ints) -> Ints:
        """The memory that the model holds by itself at each of many `capacities`."""
        total = np.zeros_like(capacities)
        for window, layers in Counter(self.windows).items():
            total += layers * (capacities if window is None else np.minimum(capacities, window))
        return self.num_kv_heads * self.token_memory * total

    def sizes(self, rules: Sequence[Rule], lengths: Sequence[int]) -> Ints:
        """Tokens held by a head of each layer, `[layers, rules, lengths]`."""

        @cache
        def of_window(window: int | None) -> list[list[int]]:
            return [[self._size(rule, n, window) for n in lengths] for rule in rules]

        return np.array([of_window(window) for window in self.windows], dtype=np.int64)

    def memory(self, rules: Sequence[Rule], lengths: Sequence[int]) -> Ints:
        """The memory of a head of each layer, `[layers, rules, lengths]`."""
        sizes = self.sizes(rules, lengths)
        if self.kv is None:
            return sizes
        parts = [self.kv.slots_bytes(sizes[:, i], rule.bits) for i, rule in enumerate(rules)]
        return np.stack(parts, axis=1)

    def _size(self, rule: Rule, length: int, window: int | None) -> int:
        return head_span(
            rule,
            length,
            sink=self.sink,
            block=self.block,
            min_span=self.min_span,
            window=window,
        ).size


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """A predicted loss to keep low, for prompts of `length` tokens.

    `table[layer, kv_head, s]`: the loss increase when that head's span is `s * block` tokens;
    the last `s`, `ceil(length / block)`, is dense. Entries may be negative, and infinite where no
    rule leads (below `min_span`). `rounding[bits]`, shaped alike: what rounding adds to the keys
    and values that such a span holds; of a width that is not named it adds nothing.
    """

    name: str
    length: int
    table: Floats
    rounding: Mapping[int | None, Floats] = field(default_factory=dict)

    def losses(self, bits: int | None) -> Floats:
        """The loss increase of every span at a width, `[layers, kv_heads, spans]`."""
        more = self.rounding.get(bits)
        return self.table if more is None else self.table + more


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One rule per KV head, held at most `budget` of what the model holds at every capacity, in
    the memory that the layout counts.

    `lengths` (tokens) holds the planned and the extrapolated lengths; capacities are all from the
    shortest of them to the longest, or to `upto`, the longest session, where that is longer.
    `between`: those where a plan that keeps the budget at `lengths` was found to pass it.
    `rules_per_layer` limits the distinct rules of a layer (the paper's plans use 2); None sets no
    limit.
    Raises BudgetError for a budget that no plan meets, and ValueError for one outside (0, 1] and
    for tables that do not fit.
    """

    layout: HeadLayout
    rules: tuple[Rule, ...]
    lengths: tuple[int, ...]
    objectives: tuple[Objective, ...]
    budget: float
    rules_per_layer: int | None = None
    upto: int = 0
    between: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_budget(self.layout, self.budget, self.lengths)
        if self.rules_per_layer is not None and self.rules_per_layer < 1:
            raise ValueError(f"rules_per_layer must be >= 1, got {self.rules_per_layer}")
        if not self.objectives:
            raise ValueError("objectives must hold at least one loss table")
        if len({objective.name for objective in self.objectives}) != len(self.objectives):
            raise ValueError("objectives must have distinct names")
        for objective in self.objectives:
            _check_table(objective, self.layout)
        held = self.memory()
        if not (held == held.min(axis=1, keepdims=True)).all(axis=(0, 2)).any():
            raise ValueError("rules must include one that is the smallest at every length")

    @property
    def limit(self) -> int | None:
        """`rules_per_layer` where it can bind, else None."""
        limit = self.rules_per_layer
        return limit if limit is not None and limit < self.layout.num_kv_heads else None

    @property
    def capacities(self) -> range:
        """Every capacity, in tokens, at which the budget must hold."""
        return range(min(self.lengths), max(*self.lengths, self.upto) + 1)

    @property
    def bounded(self) -> tuple[int, ...]:
        """The capacities at which the program counts memory, ascending."""
        return tuple(sorted({*self.lengths, *self.between, self.capacities[-1]}))

    def memory(self) -> Ints:
        """Memory held, `[layers, rules, bounded]`."""
        return self.layout.memory(self.rules, self.bounded)

    def losses(self) -> Floats:
        """Predicted loss of every choice, `[layers, kv_heads, rules, objectives]`."""
        columns = [_rule_losses(objective, self) for objective in self.objectives]
        return np.stack(columns, axis=-1)

    def allowed_memory(self, length: int) -> int:
        """The most memory all heads together may hold: the last count with share <= budget."""
        return allowed_memory(self.layout, self.budget, length)


def plan_losses(plan: Plan, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """The predicted loss of `plan` in every objective: the sum over its heads."""
    return tuple(_plan_loss(plan, objective) for objective in objectives)


def table_shape(layout: HeadLayout, length: int) -> tuple[int, int, int]:
    """Of a loss table of that length: layers, KV heads, spans."""
    return layout.num_layers, layout.num_kv_heads, math.ceil(length / layout.block) + 1


def span_entries(plan: Plan, length: int) -> Ints:
    """Where a loss table of that length holds the plan's spans, `[layers, kv_heads]`."""
    return np.array(
        [
            [_entry(head.size, length, window, plan.block) for head in heads]
            for heads, window in zip(plan.spans(length), plan.windows, strict=True)
        ]
    )


def smallest_budget(layout: HeadLayout, lengths: Sequence[int]) -> tuple[float, int]:
    """The lowest share of memory every length can meet, and the length that needs it.

    Rounded up in the fourth decimal, so that asking for it works.
    """
    plan = layout.uniform(layout.least)
    share, length = max((layout.share(plan, n), -n) for n in lengths)
    return _round_up(share), -length


def check_budget(layout: HeadLayout, budget: float, lengths: Sequence[int]) -> None:
    """Raise BudgetError, with the fix, where no plan meets `budget`; ValueError outside (0, 1]."""
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be above 0 and at most 1, got {budget:g}")
    if not lengths:
        raise ValueError("lengths must name at least one length")
    smallest, length = smallest_budget(layout, lengths)
    if layout.share(layout.uniform(layout.least), length) > budget:
        bits = layout.least.bits
        width = "" if bits is None else f" in {bits} bits"
        raise BudgetError(
            f"no plan fits budget {budget:g} at length {length}: the smallest is {smallest:g} "
            f"(every head at the minimum span of {layout.min_span} tokens{width}); "
            f"ask for --budget {smallest:g} or more"
        )


def allowed_memory(layout: HeadLayout, budget: float, length: int) -> int:
    """The most memory all heads together may hold at `length` within `budget`."""
    return int(allowed_at(layout, budget, np.array([length]))[0])


def allowed_at(layout: HeadLayout, budget: float, capacities: Ints) -> Ints:
    """The same at each of `capacities`.

    Found with the division `HeadLayout.share` makes, so that the two can never disagree.
    """
    whole = layout.dense_at(capacities)
    most: Ints = np.floor(budget * whole).astype(np.int64) + 1
    while (over := most / whole > budget).any():
        most = most - over
    return most


def undominated(memory: Ints, losses: Floats, *, whole_layers: bool) -> Bools:
    """Which choices can be in a best plan, `[layers, kv_heads, rules]`.

    A choice goes when another rule of the same head takes no more at any length and loses no more
    in any objective. Where a layer may use only a few rules (`whole_layers`), one head's better
    rule may not be affordable, so a rule goes only when one other beats it for the whole layer.
    """
    layers, heads, rules, _ = losses.shape
    keep = np.empty((layers, heads, rules), dtype=np.bool_)
    for layer in range(layers):
        if whole_layers:
            together = losses[layer].transpose(1, 0, 2).reshape(rules, -1)
            keep[layer] = _best(np.hstack([memory[layer], together]))
        else:
            for head in range(heads):
                keep[layer, head] = _best(np.hstack([memory[layer], losses[layer, head]]))
    return keep


def _best(costs: Floats) -> Bools:
    """Rows of `costs` `[rules, costs]` that no other row beats; of equal rows the first stays."""
    no_worse = (costs[:, None, :] <= costs[None, :, :]).all(axis=-1)
    first = np.tri(len(costs), k=-1, dtype=np.bool_).T
    beats = no_worse & (~no_worse.T | first)
    best: Bools = np.logical_not(beats.any(axis=0))
    return best


def _round_up(density: float) -> float:
    rounded = round(density, 4)
    return rounded if rounded >= density else round(rounded + 1e-4, 4)


def _check_table(objective: Objective, layout: HeadLayout) -> None:
    expected = table_shape(layout, objective.length)
    for table in (objective.table, *objective.rounding.values()):
        if table.shape != expected:
            raise ValueError(
                f"the loss table of {objective.name} must have shape {expected} "
                f"[layers, kv_heads, spans], got {table.shape}"
            )


def _rule_losses(objective: Objective, problem: Problem) -> Floats:
    """`[layers, kv_heads, rules]`."""
    layout = problem.layout
    sizes = layout.sizes(problem.rules, (objective.length,))[:, :, 0]
    index = [
        [_entry(int(size), objective.length, window, layout.block) for size in row]
        for row, window in zip(sizes, layout.windows, strict=True)
    ]
    of_width = {bits: objective.losses(bits) for bits in {rule.bits for rule in problem.rules}}
    tables = np.stack([of_width[rule.bits] for rule in problem.rules], axis=2)
    entries = np.array(index)[:, None, :, None]
    losses: Floats = np.take_along_axis(tables, entries, axis=3)[..., 0]
    if not np.isfinite(losses).all():
        layer, head, rule = np.argwhere(~np.isfinite(losses))[0]
        raise ValueError(
            f"the loss table of {objective.name} is not finite at layer {layer}, KV head {head}, "
            f"span {sizes[layer, rule]} tokens, which a candidate rule reaches"
        )
    return losses.astype(np.float64)


def _plan_loss(plan: Plan, objective: Objective) -> float:
    entries = span_entries(plan, objective.length)[..., None]
    found = np.take_along_axis(objective.table, entries, axis=-1)
    for bits, more in objective.rounding.items():
        there = [[rule.bits == bits for rule in layer] for layer in plan.rules]
        found += np.take_along_axis(more, entries, axis=-1) * np.array(there)[..., None]
    return float(found.sum())


def _entry(size: int, length: int, window: int | None, block: int) -> int:
    """The table index of a span; the layer's own mask, whole, is the last (dense) one."""
    own = length if window is None else min(length, window)
    return math.ceil((length if size == own else size) / block)
