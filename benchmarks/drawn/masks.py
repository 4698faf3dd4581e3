"""What a query may look at, drawn by the span contract itself on a text of a few tokens."""

from __future__ import annotations

from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drawn.theme import Theme
from moac_runtime.package.span import HeadSpan, visible

TOKENS, SINK = 24, 2
SPANS = (TOKENS, 12, 6)


def masks(theme: Theme) -> Figure:
    """A row for each query, a column for each key, for a dense head and for two spans."""
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(SPANS)), SPANS, strict=True):
        dense = size == TOKENS
        _mask(axes, theme, HeadSpan(size=size, sink=0 if dense else SINK))
        axes.set_title("a dense head" if dense else f"span {size} of {TOKENS}, sink {SINK}")
        axes.set_xlabel("key")
    figure.axes[0].set_ylabel("query")
    return figure


def _mask(axes: Axes, theme: Theme, head: HeadSpan) -> None:
    for query in range(TOKENS):
        for colour, keys in groupby(range(query + 1), key=lambda key: _colour(query, key, head)):
            run = list(keys)
            place = (query - 0.45, 0.9)
            axes.broken_barh([(run[0] - 0.5, len(run))], place, facecolor=theme[colour])
    axes.set(xlim=(-0.5, TOKENS - 0.5), ylim=(TOKENS - 0.5, -0.5), aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])


def _colour(query: int, key: int, head: HeadSpan) -> str:
    if not visible(query, key, head):
        return "line"
    return "warm" if key < head.sink else "accent"
