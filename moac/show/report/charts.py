"""The charts: memory against length, losses by kind of text, the front, predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from moac.show.report import wording
from moac.show.report.svg import Drawing, Frame, Scale, around, labels, ticks

Series = Sequence[tuple[int, float]]

_ROW = 56
_ROUND = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def density_chart(curve: Series, planned: Series, budget: float) -> Markup:
    """Share of bytes by length: `curve` at every one, `planned` where the budget is promised."""
    frame = Frame.of(x=(0, curve[-1][0]), y=(0, 1))
    drawing = frame.drawing(
        "Density against length", across="length in tokens", up="share of the dense KV cache"
    )
    steps = (0.0, 0.25, 0.5, 0.75, 1.0)
    frame.rule_up(drawing, steps, [wording.percent(share) for share in steps])
    _lengths(frame, drawing, planned)
    height = frame.y(budget)
    drawing.line("budget", frame.x.start, height, frame.x.end, height)
    name = f"budget {wording.percent(budget)}"
    drawing.text("warm", frame.x.end, height - 7, name, anchor="end")
    drawing.path("held", [(frame.x(n), frame.y(share)) for n, share in curve])
    for n, share in planned:
        told = f"{wording.tokens(n)} tokens: {wording.percent(share)}"
        drawing.dot("chosen", frame.x(n), frame.y(share), title=told)
    return drawing.markup()


def bytes_chart(curve: Series, planned: Series, dense: Callable[[int], float]) -> Markup:
    """KV bytes of one sequence by length: held by this package, and by the dense model."""
    longest = curve[-1][0]
    unit, scale = _unit(dense(longest))
    frame = Frame.of(x=(0, longest), y=(0, dense(longest) / scale * 1.04))
    drawing = frame.drawing(
        "KV bytes against length", across="length in tokens", up=f"KV cache in {unit}"
    )
    marks = ticks(0, frame.y.high)
    frame.rule_up(drawing, marks, labels(marks))
    _lengths(frame, drawing, planned)
    ends = [(frame.x(0), frame.y(0)), (frame.x(longest), frame.y(dense(longest) / scale))]
    drawing.path("dense", ends)
    drawing.path("held", [(frame.x(n), frame.y(held / scale)) for n, held in curve])
    for n, held in planned:
        told = f"{wording.tokens(n)} tokens: {wording.size(held)} of {wording.size(dense(n))}"
        drawing.dot("chosen", frame.x(n), frame.y(held / scale), title=told)
    place = 0.72 * longest
    drawing.text(
        "muted", frame.x(place) - 10, frame.y(dense(round(place)) / scale) - 6, "dense model",
        anchor="end",
    )  # fmt: skip
    place, held = next((n, held) for n, held in curve if n >= place)
    drawing.text("accent", frame.x(place), frame.y(held / scale) + 22, "this package")
    return drawing.markup()


def loss_chart(
    domains: Sequence[str],
    dense: Mapping[str, float],
    chosen: Mapping[str, float],
    uniform: Mapping[str, float] | None,
    others: Mapping[str, Mapping[str, float]],
) -> Markup:
    """Measured loss above the dense model's, a row for each kind of text."""
    shown = [chosen, *([] if uniform is None else [uniform]), *others.values()]
    width, bottom = 480.0, 28.0 + _ROW * len(domains)
    low, high = around(plan[d] - dense[d] for plan in shown for d in domains)
    across = Scale(low, high, 92, width - 30)
    drawing = Drawing(width, bottom + 46, "Measured loss above the dense model's")
    for tick, label in zip(marks := ticks(low, high, about=6), labels(marks), strict=True):
        kind = "zero" if abs(tick) < 1e-12 else "grid"
        drawing.line(kind, across(tick), 24, across(tick), bottom)
        drawing.text("tick", across(tick), bottom + 18, label, anchor="middle")
    drawing.text("name", across(0), 14, "dense", anchor="middle")
    drawing.text("name", across.end, bottom + 38, "loss above dense, nats a token", anchor="end")
    for row, domain in enumerate(domains):
        middle = 28 + _ROW * (row + 0.5)
        drawing.text("label", 0, middle + 4, domain)
        drawing.line("grid", across.start, middle, across.end, middle)

        def place(plan: Mapping[str, float], domain: str = domain) -> float:
            return across(plan[domain] - dense[domain])

        for name, plan in others.items():
            told = f"{name}, {domain}: {wording.change(plan[domain] - dense[domain])}"
            drawing.dot("other", place(plan), middle, radius=4, title=told)
        if uniform is not None:
            x, more = place(uniform), wording.change(uniform[domain] - dense[domain])
            drawing.add(
                "rect", "uniform", x=x - 5, y=middle - 5, width=10, height=10,
                title=f"uniform, {domain}: {more}",
            )  # fmt: skip
            drawing.text("warm", x, middle + 21, more, anchor="middle")
        x, more = place(chosen), wording.change(chosen[domain] - dense[domain])
        drawing.dot("chosen", x, middle, radius=6, title=f"chosen plan, {domain}: {more}")
        drawing.text("accent", x, middle - 11, more, anchor="middle")
    return drawing.markup()


def front_chart(
    objectives: Sequence[str], plans: Mapping[str, Sequence[float]], chosen: str
) -> Markup:
    """Predicted loss of every plan of the front, `plans[name][objective]`; lower is better."""
    values = [value for losses in plans.values() for value in losses]
    frame = Frame.of(x=(0, max(1, len(objectives) - 1)), y=around(values), right=64)
    drawing = frame.drawing(
        "Predicted loss of the plans of the Pareto front",
        across="planned for a length of",
        up="predicted loss",
    )
    marks = ticks(frame.y.low, frame.y.high)
    frame.rule_up(drawing, marks, labels(marks))
    for place, objective in enumerate(objectives):
        drawing.line("grid", frame.x(place), frame.y.start, frame.x(place), frame.y.end)
        drawing.text("tick", frame.x(place), frame.y.start + 20, objective, anchor="middle")
    for name, losses in sorted(plans.items(), key=lambda item: item[0] == chosen):
        kind = "chosen" if name == chosen else "other"
        points = [(frame.x(place), frame.y(loss)) for place, loss in enumerate(losses)]
        drawing.path(f"line {kind}", points, title=name)
        for (x, y), loss, objective in zip(points, losses, objectives, strict=True):
            told = f"{name}, {objective}: {wording.short(loss)}"
            drawing.dot(kind, x, y, radius=5 if kind == "chosen" else 4, title=told)
    return drawing.markup()


def prediction_chart(
    front: Mapping[str, tuple[float, float]],
    ladder: Mapping[str, tuple[float, float]],
    chosen: str,
    interval: tuple[float, float],
) -> Markup:
    """Predicted against measured loss above dense in nats, `plans[name] = (predicted, measured)`.

    `ladder`: the plans that the prediction was learned from. `interval`: of `chosen`. Both axes
    go by roots, which show small and large losses on one chart.
    """
    shown = [*front.values(), *ladder.values(), (interval[1], 0.0)]
    high = _root(max(value for pair in shown for value in pair)) * 1.06 or 1.0
    low = min(0.0, *(_root(value) for pair in shown for value in pair)) * 1.06
    frame = Frame.of(x=(0, high), y=(low, high))
    drawing = frame.drawing(
        "Predicted against measured loss",
        across="predicted above dense, nats a token",
        up="measured above dense, nats a token",
    )
    marks = _apart([mark for mark in _ROUND if mark <= high**2], 0.07 * (high - low))
    frame.rule_up(drawing, [_root(mark) for mark in marks], labels(marks))
    frame.mark_across(drawing, [_root(mark) for mark in marks], labels(marks))
    drawing.line("zero", frame.x(0), frame.y(0), frame.x(high), frame.y(high))
    for name, pair in ladder.items():
        x, y = frame.x(_root(pair[0])), frame.y(_root(pair[1]))
        drawing.add("rect", "rung", x=x - 4, y=y - 4, width=8, height=8, title=_told(name, pair))
    for name, pair in sorted(front.items(), key=lambda item: item[0] == chosen):
        x, y = frame.x(_root(pair[0])), frame.y(_root(pair[1]))
        if name == chosen:
            ends = [(frame.x(_root(end)), y) for end in interval]
            drawing.path("line chosen", ends, title=f"{wording.percent(0.9)} interval")
            drawing.dot("chosen", x, y, radius=6, title=_told(name, pair))
        else:
            drawing.dot("other", x, y, title=_told(name, pair))
    return drawing.markup()


def _told(name: str, pair: tuple[float, float]) -> str:
    predicted, measured = map(wording.change, pair)
    return f"{name}: predicted {predicted}, measured {measured}"


def _apart(marks: Sequence[float], least: float) -> list[float]:
    """Those of `marks`, from zero up, whose roots are `least` or more from the last one kept."""
    kept = [0.0]
    for mark in marks:
        if _root(mark) - _root(kept[-1]) >= least:
            kept.append(mark)
    return kept


def _root(loss: float) -> float:
    return math.copysign(math.sqrt(abs(loss)), loss)


def _lengths(frame: Frame, drawing: Drawing, planned: Series) -> None:
    frame.mark_across(drawing, [n for n, _ in planned], [wording.tokens(n) for n, _ in planned])


def _unit(most: float) -> tuple[str, float]:
    """The unit of 1024 that leaves `most` at least one of it, and its bytes."""
    power = max(p for p in range(5) if most >= 1024**p or p == 0)
    return ("B", "KiB", "MiB", "GiB", "TiB")[power], 1024.0**power
