"""The span heat map in a terminal: a row for each layer, lengths side by side."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import click

from moac.show.report.heat_map import step

PLAIN_WIDTH = 99

_BLOCKS = "\N{MIDDLE DOT}▁▂▃▄▅▆▇█"
_ASCII = ".,:-=+*#@"
_BACKGROUNDS = (255, 189, 153, 117, 75, 33, 26, 19, 17)  # of the 256 colours
_DARK_FROM = 6  # from this step on, the background wants white text
_GAP = 3


@dataclass(frozen=True, slots=True)
class Look:
    """What a terminal shows: `width` in columns, `colour`, and `blocks` (else ASCII signs)."""

    width: int = PLAIN_WIDTH
    colour: bool = False
    blocks: bool = True

    @classmethod
    def of(cls, stream: TextIO) -> Look:
        """Colour and the terminal's own width on a terminal; no colour where NO_COLOR is set."""
        terminal = stream.isatty()
        return cls(
            width=shutil.get_terminal_size().columns if terminal else PLAIN_WIDTH,
            colour=terminal
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb",
            blocks=_can_write(stream, _BLOCKS),
        )


@dataclass(frozen=True, slots=True)
class _Grid:
    """Where things stand: `label` and `cell` columns wide, `numbered` cells or signs alone."""

    label: int
    heads: int
    cell: int
    numbered: bool

    @classmethod
    def fitting(cls, layers: int, heads: int, lengths: Sequence[int], width: int) -> _Grid:
        """Numbers where all lengths fit side by side; else signs with a gap, else without."""
        label = len(f"layer {layers - 1}")
        number = len(str(lengths[-1])) + 2
        for cell in (number, 2):
            grid = cls(label, heads, cell, numbered=cell == number)
            if grid.width(len(lengths)) <= width:
                return grid
        return cls(label, heads, 1, numbered=False)

    @property
    def panel(self) -> int:
        """Columns of one length, the gap before it included."""
        return _GAP + max(self.heads * self.cell, len("at 999999"))

    def width(self, panels: int) -> int:
        """Columns of so many lengths side by side."""
        return self.label + panels * self.panel

    def strips(self, lengths: Sequence[int], width: int) -> Iterator[Sequence[int]]:
        """As many lengths side by side as fit in `width`, one at least."""
        count = max(1, (width - self.label) // self.panel)
        for start in range(0, len(lengths), count):
            yield lengths[start : start + count]


def span_map(found: Mapping[str, Any], look: Look) -> str:
    """The legend, and every head's span at every planned length of an inspected package.

    Cells bear the span in tokens where all lengths fit side by side, else a sign alone.
    """
    lengths: Sequence[int] = found["lengths"]
    rules = found["rules"]
    grid = _Grid.fitting(len(rules), len(rules[0]), lengths, look.width)
    lines = [_title(grid), _legend(look)]
    for strip in grid.strips(lengths, look.width):
        lines += ["", " " * grid.label + "".join(_heading(n, grid) for n in strip)]
        for layer in range(len(rules)):
            panels = (_panel(found["spans"][str(n)][layer], n, grid, look) for n in strip)
            lines.append(f"layer {layer}".ljust(grid.label) + "".join(panels))
    lines += _width_lines(found, grid)
    return "\n".join(line.rstrip() for line in lines)


def _width_lines(found: Mapping[str, Any], grid: _Grid) -> Iterator[str]:
    """A row for each layer, of each KV head the bits of its keys and values; none where all are
    of the package's dtype."""
    widths: Sequence[Sequence[int | None]] = found["widths"]
    if all(bits is None for layer in widths for bits in layer):
        return
    yield from ("", f"widths of KV heads, in bits; - is {found['dtype']}")
    for layer, row in enumerate(widths):
        told = " ".join("-" if bits is None else str(bits) for bits in row)
        yield f"layer {layer}".ljust(grid.label) + " " * _GAP + told


def _title(grid: _Grid) -> str:
    return f"spans of KV heads, {'in tokens' if grid.numbered else 'in tokens with --json'}"


def _legend(look: Look) -> str:
    names = ("under 1/8", *(f"{eighth}/8" for eighth in range(1, 8)), "all")
    parts = (f"{_paint(sign, i, look)} {names[i]}" for i, sign in enumerate(_signs(look)))
    return "share kept: " + "  ".join(parts)


def _heading(length: int, grid: _Grid) -> str:
    return f"{'':{_GAP}}{f'at {length}':<{grid.panel - _GAP}}"


def _panel(spans: Sequence[int], capacity: int, grid: _Grid, look: Look) -> str:
    """One layer at one length."""
    cells = "".join(_cell(span, capacity, grid, look) for span in spans)
    return " " * _GAP + cells + " " * (grid.panel - _GAP - grid.heads * grid.cell)


def _cell(span: int, capacity: int, grid: _Grid, look: Look) -> str:
    colour = step(span, capacity)
    sign = _signs(look)[colour]
    text = f"{sign}{span:>{grid.cell - 2}}" if grid.numbered else sign
    return _paint(text, colour, look) + " " * (grid.cell - len(text))


def _paint(text: str, colour: int, look: Look) -> str:
    if not look.colour:
        return text
    ink = 231 if colour >= _DARK_FROM else 16
    return click.style(text, fg=ink, bg=_BACKGROUNDS[colour])


def _signs(look: Look) -> str:
    return _BLOCKS if look.blocks else _ASCII


def _can_write(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
