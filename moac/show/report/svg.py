"""Drawings as SVG text: elements with escaped content, scales, round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from moac.show.report import wording

FONT = 13  # of text in a chart, px; the style sheet says the same


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)


class Drawing:
    """An `<svg>` of `width` x `height` px that shrinks with the page; classes give colours."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self._root = Element(
            "svg",
            {
                "viewBox": f"0 0 {_number(width)} {_number(height)}",
                "width": _number(width),
                "height": _number(height),
                "role": "img",
                "aria-label": label,
            },
        )

    def add(
        self, tag: str, kind: str, *, text: str = "", title: str = "", **place: float | str
    ) -> None:
        """One element of class `kind`; `title` shows where the pointer rests."""
        shown = {
            name.replace("_", "-"): value if isinstance(value, str) else _number(value)
            for name, value in place.items()
        }
        element = SubElement(self._root, tag, {"class": kind, **shown})
        element.text = text or None
        if title:
            SubElement(element, "title").text = title

    def text(self, kind: str, x: float, y: float, text: str, *, anchor: str = "start") -> None:
        """`text` on the baseline `y`."""
        self.add("text", kind, x=x, y=y, text_anchor=anchor, text=text)

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        """A straight line."""
        self.add("line", kind, x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, kind: str, points: Iterable[tuple[float, float]], *, title: str = "") -> None:
        """A line through `points`."""
        steps = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self.add("polyline", kind, points=steps, title=title)

    def dot(self, kind: str, x: float, y: float, *, radius: float = 4.5, title: str = "") -> None:
        """A filled circle."""
        self.add("circle", kind, cx=x, cy=y, r=radius, title=title)

    def markup(self) -> Markup:
        """The element as text, safe to stand in a page."""
        return Markup(tostring(self._root, encoding="unicode"))


@dataclass(frozen=True, slots=True)
class Frame:
    """The inside of a chart `width` x `height` px, and its scales."""

    width: float
    height: float
    x: Scale
    y: Scale

    @classmethod
    def of(
        cls,
        *,
        x: tuple[float, float],
        y: tuple[float, float],
        width: float = 480,
        height: float = 300,
        left: float = 64,
        right: float = 24,
    ) -> Frame:
        """A frame for values `x` and `y` (lowest, highest) with room for labels."""
        across = Scale(*x, left, width - right)
        return cls(width, height, across, Scale(*y, height - 48, 28))

    def drawing(self, label: str, *, across: str, up: str) -> Drawing:
        """An empty drawing with the axes' names."""
        made = Drawing(self.width, self.height, label)
        made.text("name", 4, 14, up)
        made.text("name", self.x.end, self.height - 6, across, anchor="end")
        return made

    def rule_up(self, drawing: Drawing, ticks: Sequence[float], labels: Sequence[str]) -> None:
        """Lines across at `ticks` of the upward axis."""
        for tick, label in zip(ticks, labels, strict=True):
            height = self.y(tick)
            drawing.line("grid", self.x.start, height, self.x.end, height)
            drawing.text("tick", self.x.start - 8, height + 4, label, anchor="end")

    def mark_across(self, drawing: Drawing, ticks: Sequence[float], labels: Sequence[str]) -> None:
        """Ticks below, at those of `ticks` whose labels do not touch."""
        free = -math.inf
        for tick, label in sorted(zip(ticks, labels, strict=True), reverse=True):
            middle, half = self.x(tick), 0.3 * FONT * len(label) + 6
            if -(middle + half) < free:
                continue
            free = -(middle - half)
            drawing.line("grid", middle, self.y.start, middle, self.y.start + 5)
            drawing.text("tick", middle, self.y.start + 20, label, anchor="middle")


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    least = (high - low) / (about + 1.5)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def around(values: Iterable[float], *, zero: bool = True) -> tuple[float, float]:
    """A range that shows all `values`, and zero where asked, with some air above."""
    found = [*values, *([0.0] if zero else [])]
    low, high = min(found), max(found)
    air = 0.08 * (high - low) or abs(high) * 0.08 or 1.0
    return (low if zero and low == 0 else low - air), high + air


def labels(values: Sequence[float]) -> list[str]:
    """The shortest labels that tell `values` apart."""
    return [wording.short(0.0 if abs(value) < 1e-12 else value) for value in values]


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
