"""The span heat map: a row for each layer, a column for each KV head, colour for what is kept."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from moac.show.report import wording
from moac.show.report.svg import Drawing

STEPS = 9  # classes s0 to s8 of the style sheet; s8 is a head that keeps everything

_GUTTER = 36
_HEAD = 34


def step(span: int, capacity: int) -> int:
    """The colour of a head that keeps `span` of `capacity` tokens: eighths, and 8 for all."""
    return STEPS - 1 if span >= capacity else min(span * (STEPS - 1) // capacity, STEPS - 2)


def heat_map(
    spans: Sequence[Sequence[int]], capacity: int, windows: Sequence[int | None]
) -> Markup:
    """`spans[layer][kv_head]` in tokens at `capacity`; `windows[layer]` the model's own."""
    layers, heads = len(spans), len(spans[0])
    across, down, numbered = _cell(layers, heads, capacity)
    drawing = Drawing(
        _GUTTER + heads * across + 2,
        _HEAD + layers * down + 2,
        f"Spans of {layers} layers of {heads} KV heads at {wording.tokens(capacity)} tokens",
    )
    drawing.text("tick", _GUTTER + heads * across / 2, 12, "KV head", anchor="middle")
    drawing.text("tick", 0, 28, "layer")
    for head in _labelled(heads, across):
        drawing.text("tick", _GUTTER + (head + 0.5) * across, 28, str(head), anchor="middle")
    for layer in _labelled(layers, down):
        middle = _HEAD + (layer + 0.5) * down + 4
        drawing.text("tick", _GUTTER - 8, middle, str(layer), anchor="end")
    for layer, row in enumerate(spans):
        for head, span in enumerate(row):
            left, top = _GUTTER + head * across, _HEAD + layer * down
            colour = step(span, capacity)
            drawing.add(
                "rect",
                f"s{colour}",
                x=left,
                y=top,
                width=across - 1.5,
                height=down - 1.5,
                title=f"layer {layer}, KV head {head}: {_told(span, capacity, windows[layer])}",
            )
            if numbered:
                x, y = left + across / 2 - 0.75, top + down / 2 + 3.5
                drawing.text(f"n{colour}", x, y, str(span), anchor="middle")
    return drawing.markup()


def _cell(layers: int, heads: int, capacity: int) -> tuple[float, float, bool]:
    """Width and height of a cell in px, and whether its number has room."""
    width = 48.0 if heads <= 4 else 176 / heads
    needed = 7.0 * len(str(capacity)) + 6
    if layers <= 48 and heads <= 8:
        return max(width, needed), 18.0, True
    return max(width, 12.0), 12.0, False


def _labelled(count: int, pixels: float) -> range:
    """Which of `count` rows or columns bear their number: each has 16 px or more."""
    return range(0, count, next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * pixels >= 16))


def _told(span: int, capacity: int, window: int | None) -> str:
    if span == capacity:
        return f"all {wording.tokens(capacity)} tokens"
    share = wording.percent(span / capacity)
    own = ", the model's own window" if span == window else ""
    return f"{wording.tokens(span)} of {wording.tokens(capacity)} tokens ({share}){own}"
