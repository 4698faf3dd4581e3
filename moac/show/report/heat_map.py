"""The span heat map: a row for each layer, a column for each KV head, colour for what is kept."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from moac.show.report import wording
from moac.show.report.svg import Drawing

STEPS = 9  # classes s0 to s8 of the style sheet; s8 is a head that keeps everything

_SHADES = {None: STEPS - 1, 8: 4, 4: 1}  # of widths, the widest darkest
_GUTTER = 36
_HEAD = 34


def step(span: int, capacity: int) -> int:
    """The colour of a head that keeps `span` of `capacity` tokens: eighths, and 8 for all."""
    return STEPS - 1 if span >= capacity else min(span * (STEPS - 1) // capacity, STEPS - 2)


def heat_map(
    spans: Sequence[Sequence[int]], capacity: int, windows: Sequence[int | None]
) -> Markup:
    """`spans[layer][kv_head]` in tokens at `capacity`; `windows[layer]` the model's own."""
    cells = [
        [(step(span, capacity), str(span), _told(span, capacity, windows[layer])) for span in row]
        for layer, row in enumerate(spans)
    ]
    return _drawn(
        cells, f"at {wording.tokens(capacity)} tokens", "Spans", digits=len(str(capacity))
    )


def width_map(widths: Sequence[Sequence[int | None]], dtype: str) -> Markup:
    """`widths[layer][kv_head]` in bits, None for the package's `dtype`."""
    told = {
        bits: f"keys and values in {bits or dtype}{' bits' if bits else ''}" for bits in _SHADES
    }
    cells = [[(_SHADES[bits], str(bits or ""), told[bits]) for bits in row] for row in widths]
    return _drawn(cells, "in bits", "Widths", digits=1)


def _drawn(
    cells: Sequence[Sequence[tuple[int, str, str]]], where: str, what: str, *, digits: int
) -> Markup:
    """`cells[layer][kv_head]`: colour, number and what is told of it."""
    layers, heads = len(cells), len(cells[0])
    across, down, numbered = _cell(layers, heads, digits)
    drawing = Drawing(
        _GUTTER + heads * across + 2,
        _HEAD + layers * down + 2,
        f"{what} of {layers} layers of {heads} KV heads {where}",
    )
    drawing.text("tick", _GUTTER + heads * across / 2, 12, "KV head", anchor="middle")
    drawing.text("tick", 0, 28, "layer")
    for head in _labelled(heads, across):
        drawing.text("tick", _GUTTER + (head + 0.5) * across, 28, str(head), anchor="middle")
    for layer in _labelled(layers, down):
        middle = _HEAD + (layer + 0.5) * down + 4
        drawing.text("tick", _GUTTER - 8, middle, str(layer), anchor="end")
    for layer, row in enumerate(cells):
        for head, (colour, number, told) in enumerate(row):
            left, top = _GUTTER + head * across, _HEAD + layer * down
            drawing.add(
                "rect",
                f"s{colour}",
                x=left,
                y=top,
                width=across - 1.5,
                height=down - 1.5,
                title=f"layer {layer}, KV head {head}: {told}",
            )
            if numbered:
                x, y = left + across / 2 - 0.75, top + down / 2 + 3.5
                drawing.text(f"n{colour}", x, y, number, anchor="middle")
    return drawing.markup()


def _cell(layers: int, heads: int, digits: int) -> tuple[float, float, bool]:
    """Width and height of a cell in px, and whether its number has room."""
    width = 48.0 if heads <= 4 else 176 / heads
    needed = 7.0 * digits + 6
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
