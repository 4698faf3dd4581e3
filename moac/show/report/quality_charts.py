"""Charts of measured quality: every method's figures with their intervals, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moac.show.report import wording
from moac.show.report.svg import Drawing, Frame, labels, ticks

_APART = 0.14  # of the space of one place, between methods
_SIZE = 4.5
_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean with its 95 % interval, None where there is none."""

    value: float
    low: float | None
    high: float | None


Series = Mapping[str, Sequence[Figure]]
"""The figures of each method, a figure for each place on the axis."""


def quality_chart(
    series: Series, places: Sequence[str], *, label: str, across: str, share: bool
) -> Markup:
    """Figures at `places`, named on the axis; `share`: they are shares, else losses in nats."""
    frame = Frame.of(x=(-0.5, len(places) - 0.5), y=(0, 1) if share else _range(series), right=8)
    up = "share found" if share else "nats a token, lower is better"
    drawing = frame.drawing(label, across=across, up=up)
    marks = _STEPS if share else ticks(frame.y.low, frame.y.high)
    shown = [wording.percent(mark) for mark in marks] if share else labels(marks)
    frame.rule_up(drawing, marks, shown)
    for place, name in enumerate(places):
        drawing.text("tick", frame.x(place), frame.y.start + 20, name, anchor="middle")
    for number, (method, figures) in reversed(list(enumerate(series.items()))):
        shift = _APART * (number - (len(series) - 1) / 2)
        _add_method(drawing, frame, method, figures, places, shift)
    return drawing.markup()


def _add_method(
    drawing: Drawing,
    frame: Frame,
    method: str,
    figures: Sequence[Figure],
    places: Sequence[str],
    shift: float,
) -> None:
    points = [(frame.x(i + shift), frame.y(f.value)) for i, f in enumerate(figures)]
    drawing.path(f"trend q-{method}", points)
    for (x, y), figure, place in zip(points, figures, places, strict=True):
        told = f"{method}, {place}: {wording.short(figure.value)}"
        if figure.low is not None and figure.high is not None:
            told += f" ({wording.short(figure.low)} to {wording.short(figure.high)})"
            drawing.line(f"range q-{method}", x, frame.y(figure.low), x, frame.y(figure.high))
        _add_mark(drawing, method, x, y, told)


def _add_mark(drawing: Drawing, method: str, x: float, y: float, told: str) -> None:
    """A shape for each method, so that colour is not all that tells them apart."""
    if method == "uniform":
        drawing.add(
            "rect", f"q-{method}", x=x - _SIZE, y=y - _SIZE, width=2 * _SIZE, height=2 * _SIZE,
            title=told,
        )  # fmt: skip
    elif method == "layerwise":
        reach = 1.4 * _SIZE
        corners = [(x, y - reach), (x + reach, y), (x, y + reach), (x - reach, y)]
        shape = " ".join(f"{a:.2f},{b:.2f}" for a, b in corners)
        drawing.add("polygon", f"q-{method}", points=shape, title=told)
    else:
        drawing.dot(f"q-{method}", x, y, radius=_SIZE + (method == "moac"), title=told)


def _range(series: Series) -> tuple[float, float]:
    ends = [
        end
        for figures in series.values()
        for figure in figures
        for end in (figure.value, figure.low, figure.high)
        if end is not None
    ]
    low, high = min(ends), max(ends)
    air = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
    return max(low - air, 0.0), high + air
