"""The largest relative drop over everything that `moac eval` asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from evaluated import DENSE
from made import UNIFORM
from pooled import Case, found, quotient, text_loss
from told import percent, table

from claims.claim import Claim
from claims.retrieval import FLOOR, near_floor
from claims.setting import OURS, Setting
from moac.evaluation.intervals import Interval
from moac.evaluation.request import NLL, RULER
from moac.evaluation.wordings import UNSEEN

_PAPER = "within 5 %"


def measure(setting: Setting) -> dict[str, Any]:
    """Every task under dense, our plan and a uniform one, at the package's budget."""
    budget, lengths = setting.budgets[0], setting.suite_lengths
    setting.prepare([budget])
    plans = {OURS: setting.plan(budget), UNIFORM: setting.uniform(budget, lengths, "suite")}
    seed = setting.seeds[0]
    cases = list(setting.passkeys(plans, budget, lengths))
    for asked in (
        {"tasks": ("longeval", RULER), "samples": setting.suite_cases},
        {"tasks": (NLL,), "samples": setting.texts},
    ):
        cases += setting.evaluated(plans, budget, lengths, seed, **asked)
    return {
        "budget": budget,
        "effort": setting.effort,
        "lengths": list(lengths),
        "cases": cases,
    }


@dataclass(frozen=True, slots=True)
class Drop:
    """How much less of a task a method gets than dense, as a share of dense's.

    Of text, how much its perplexity rises. `near_floor`: dense itself gets next to nothing.
    """

    task: str
    unseen: bool
    value: float | None
    ci95: Interval | None
    n: int
    near_floor: bool


def drops(part: dict[str, Any], method: str) -> list[Drop]:
    """Of every task, those in unseen wordings first."""
    made = [
        _drop(cases, method) for cases in _by_task(part).values()
    ]  # text is in nobody's wording
    return sorted(made, key=lambda drop: not drop.unseen)


def _drop(cases: Sequence[Case], method: str) -> Drop:
    task = cases[0]["task"]
    unseen = task == NLL or cases[0]["wording"] == UNSEEN
    if task == NLL:
        rise = text_loss(cases, method, less=DENSE)
        ends = None if rise.ci95 is None else (exp(rise.ci95[0]) - 1, exp(rise.ci95[1]) - 1)
        return Drop(task, unseen, exp(rise.value) - 1, ends, rise.n, near_floor=False)
    share = quotient(cases, method, DENSE)
    value = None if share.value is None else 1 - share.value
    ends = None if share.ci95 is None else (1 - share.ci95[1], 1 - share.ci95[0])
    return Drop(task, unseen, value, ends, share.n, near_floor(cases))


def claims(part: dict[str, Any]) -> Iterator[Claim]:
    """The largest drop among tasks in unseen wordings, then among all."""
    ours = drops(part, OURS)
    lengths = ", ".join(map(str, part["lengths"]))
    for name, unseen in (("tasks in unseen wordings and text", True), ("all tasks", False)):
        among = [drop for drop in ours if drop.unseen or not unseen]
        low = [drop.task for drop in among if drop.near_floor]
        yield Claim(
            f"largest relative drop below dense at density {part['budget']:g}, {name}",
            f"{_largest(among)}; uniform: "
            f"{_largest([d for d in drops(part, UNIFORM) if d.unseen or not unseen])}",
            _PAPER,
            f"{len(among)} tasks of moac eval at {lengths} tokens, {part['effort']} plan; of text "
            "the rise of perplexity; bootstrap over cases, the most of several chance draws",
            f"dense is near the floor, so left out: {', '.join(low)}" if low else "",
        )


def _largest(among: Sequence[Drop]) -> str:
    told = [drop for drop in among if drop.value is not None and not drop.near_floor]
    if not told:
        return "not told"
    worst = max(told, key=lambda drop: drop.value or 0.0)
    return f"{_percent(worst)} % ({worst.task})"


def _percent(drop: Drop) -> str:
    return "-" if drop.value is None else f"{100 * drop.value:+.1f}" + _ends(drop.ci95)


def _ends(interval: Interval | None) -> str:
    return "" if interval is None else " ({:+.1f} to {:+.1f})".format(*(100 * e for e in interval))


def details(part: dict[str, Any]) -> str:
    """Every task, in Markdown."""
    by_task, rows = _by_task(part), []
    for ours, uniform in zip(drops(part, OURS), drops(part, UNIFORM), strict=True):
        cases = by_task[ours.task]
        if ours.task == NLL:
            wording = "text"
            figures = [f"{text_loss(cases, m).value:.4f} nats" for m in (DENSE, UNIFORM, OURS)]
        else:
            wording = cases[0]["wording"]
            figures = [_share(cases, m) for m in (DENSE, UNIFORM, OURS)]
        floor = "yes" if ours.near_floor else ""
        rows.append(
            [ours.task, wording, ours.n, *figures, _percent(uniform), _percent(ours), floor]
        )
    header = [
        "task",
        "wording",
        "cases",
        DENSE,
        UNIFORM,
        OURS,
        "uniform's drop",
        "our drop",
        "floor",
    ]
    return (
        "## Suite\n\nScores in percent with the 95 % interval (Wilson), and how much less of "
        "dense's a plan gets, in percent with the 95 % interval of a paired bootstrap. Floor: the "
        f"lower end of dense's interval is below {FLOOR:.0%}, and a drop tells next to "
        f"nothing.\n\n{table(header, rows)}"
    )


def _share(cases: Sequence[Case], method: str) -> str:
    figure = found(cases, method)
    return percent(figure.value, figure.ci95)


def _by_task(part: dict[str, Any]) -> dict[str, list[Case]]:
    tasks: dict[str, list[Case]] = {}
    for case in part["cases"]:
        tasks.setdefault(case["task"], []).append(case)
    return tasks
