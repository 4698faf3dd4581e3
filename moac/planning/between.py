"""The budget between the planned lengths, of which rules that jump late leave some unspent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from moac.planning.capacities import held_at, memory_of, sizes_at
from moac.planning.problem import Floats, Ints, Problem, allowed_at, span_entries
from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule

_STEPS = 8  # of a block, in which jumps are moved
_FIRST = 4096  # capacities that are looked at before all of them: most moves fail there

Heads = tuple[tuple[int, int], ...]
"""`(layer, kv_head)` of heads that move together."""


def spend_between(problem: Problem, plan: Plan) -> Plan:
    """`plan` with spans that jump as early as the budget lets them.

    The `alpha` of a head rises by less than a block, so that its spans at the planned and the
    profiled lengths stay, and with them all predicted losses. Heads that lose most by a block
    less come first; where a layer has few rules, all its heads of one rule move together.
    """
    capacities = np.array(problem.capacities, dtype=np.int64)
    held = held_at(plan, capacities, problem.layout.kv)
    free = allowed_at(problem.layout, problem.budget, capacities) - held
    rules = [list(layer) for layer in plan.rules]
    groups = _groups(problem, plan)
    for step in range(_STEPS, 0, -1):
        for group in groups:
            raised = group.raised(step * (plan.block - 1) // _STEPS)
            moved = group.take(raised, capacities, free) if group.keeps(raised) else []
            if moved:
                free -= len(moved) * group.more(raised, capacities)
            for layer, kv_head in moved:
                rules[layer][kv_head] = raised
    return problem.layout.plan(rules)


@dataclass(slots=True)
class _Group:
    """Heads of one `rule` and own `window` that have not moved, those in most need first.

    `kept`: the capacities at which spans stay. `kv`: as of the layout.
    """

    rule: Rule
    window: int | None
    heads: list[Heads]
    block: int
    min_span: int
    kept: Ints
    kv: KvShape | None

    def raised(self, tokens: int) -> Rule:
        """The rule with so much more `alpha`."""
        return replace(self.rule, alpha=self.rule.alpha + tokens)

    def keeps(self, raised: Rule) -> bool:
        """Whether there are heads, whose spans stay where they must."""
        return bool(self.heads) and not self.more(raised, self.kept).any()

    def more(self, raised: Rule, capacities: Ints) -> Ints:
        """Memory that a head takes more under `raised`, at each of `capacities`."""
        return self._memory(raised, capacities) - self._memory(self.rule, capacities)

    def take(self, raised: Rule, capacities: Ints, free: Ints) -> list[tuple[int, int]]:
        """As many heads as `free` `[capacities]` memory lets move to `raised`; the others stay."""
        count = self._fitting(raised, capacities[:_FIRST], free[:_FIRST])
        if count:
            count = self._fitting(raised, capacities, free)
        moved, self.heads = self.heads[:count], self.heads[count:]
        return [head for together in moved for head in together]

    def _fitting(self, raised: Rule, capacities: Ints, free: Ints) -> int:
        more = self.more(raised, capacities)
        room = int((free[more > 0] // more[more > 0]).min(initial=np.iinfo(np.int64).max))
        sizes = np.cumsum([len(together) for together in self.heads])
        return int(np.searchsorted(sizes, room, side="right"))

    def _memory(self, rule: Rule, capacities: Ints) -> Ints:
        sizes = sizes_at(
            rule, capacities, block=self.block, min_span=self.min_span, window=self.window
        )
        return memory_of(sizes, rule.bits, self.kv)


def _groups(problem: Problem, plan: Plan) -> list[_Group]:
    """The heads of `plan` that move alike, those in most need first."""
    need = sum(_needs(problem, plan), np.zeros((len(plan.rules), len(plan.rules[0]))))
    found: dict[tuple[Rule, int | None], list[Heads]] = defaultdict(list)
    for layer, window in enumerate(plan.windows):
        for rule, heads in _together(problem, plan, layer):
            found[rule, window].append(heads)
    kept = np.array(sorted({*problem.lengths, *(o.length for o in problem.objectives)}))

    def urgency(heads: Heads) -> tuple[float, Heads]:
        return -float(np.mean([need[head] for head in heads])), heads

    spans, kv = (plan.block, plan.min_span), problem.layout.kv
    groups = [
        _Group(rule, window, sorted(heads, key=urgency), *spans, kept, kv)
        for (rule, window), heads in found.items()
    ]
    return sorted(groups, key=lambda group: urgency(group.heads[0]))


def _together(problem: Problem, plan: Plan, layer: int) -> Iterator[tuple[Rule, Heads]]:
    """The heads of a layer, by rule where it may have only a few."""
    rules = plan.rules[layer]
    if problem.limit is None:
        yield from ((rule, ((layer, head),)) for head, rule in enumerate(rules))
    else:
        for rule in dict.fromkeys(rules):
            yield rule, tuple((layer, head) for head, other in enumerate(rules) if other == rule)


def _needs(problem: Problem, plan: Plan) -> Iterator[Floats]:
    """What each head loses by a block less, `[layers, kv_heads]`, in each objective."""
    for objective in problem.objectives:
        entries = span_entries(plan, objective.length)[..., None]
        losses = np.take_along_axis(objective.table, np.maximum(entries - 1, 0), axis=-1)
        lost = (losses - np.take_along_axis(objective.table, entries, axis=-1))[..., 0]
        yield np.where(np.isfinite(lost), lost, 0.0)
