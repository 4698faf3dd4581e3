"""The heat map of a plan as one SVG: the report's own maps, side by side, and a legend."""

from __future__ import annotations

import re
from xml.etree.ElementTree import fromstring

from drawn import measured
from drawn.theme import CSS, Theme
from moac.show.report.heat_map import STEPS, heat_map

LENGTHS = (1024, 2048, 4096)
_TOP, _GAP, _LEGEND = 24, 28, 40
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif'
_ORIGIN = 'xmlns="http://www.w3.org/2000/svg"'


def spans(theme: Theme) -> str:
    """The spans of every KV head at each planned length."""
    plan = measured.plan()
    parts, left, height = [], 0.0, 0.0
    for length in LENGTHS:
        sizes = [[head.size for head in layer] for layer in plan.spans(length)]
        drawn = heat_map(sizes, length, plan.windows)
        root = fromstring(drawn)
        parts.append(f'<text class="label" x="{left + 36:g}" y="14">{length:,} tokens</text>')
        parts.append(f'<g transform="translate({left:g} {_TOP})">{drawn}</g>')
        left += float(root.attrib["width"]) + _GAP
        height = max(height, float(root.attrib["height"]))
    parts.append(_legend(_TOP + height + 14))
    return _document(theme, left - _GAP, _TOP + height + _LEGEND, parts)


def _legend(top: float) -> str:
    """A box for each colour, from an eighth of the text to all of it."""
    boxes = [
        f'<rect class="s{step}" x="{36 + 30 * step}" y="{top:g}" width="28" height="14"/>'
        for step in range(STEPS)
    ]
    after = 36 + 30 * STEPS + 8
    told = "kept: under an eighth of the text, to all of it"
    return "".join([*boxes, f'<text class="tick" x="{after}" y="{top + 11:g}">{told}</text>'])


def _document(theme: Theme, width: float, height: float, parts: list[str]) -> str:
    colours = "".join(f"--{name}: {colour}; " for name, colour in theme.colours.items())
    rules = "\n".join(re.findall(r"^svg (?!polyline|circle|line|rect|\.q).*$", CSS, re.MULTILINE))
    style = f":root {{ {colours} }}\nsvg {{ font-family: {_FONT}; }}\n{rules}"
    return (
        f'<svg {_ORIGIN} viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}"><style>\n{style}\n</style>{"".join(parts)}</svg>\n'
    )
