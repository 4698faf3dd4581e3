"""Light and dark: the colours of the report's style sheet, for matplotlib and for plain SVG."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moac.show.report

CSS = (Path(moac.show.report.__file__).parent / "report.css").read_text(encoding="utf-8")
_SETTINGS: Mapping[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "moac",  # the same picture has the same bytes
}


@dataclass(frozen=True, slots=True)
class Theme:
    """`colours`: by the names that the style sheet gives them, such as `ink` and `accent`."""

    name: str
    colours: Mapping[str, str]

    def __getitem__(self, name: str) -> str:
        return self.colours[name]

    def settings(self) -> dict[str, Any]:
        """What matplotlib is told."""
        ink, muted, line = self["ink"], self["muted"], self["line"]
        return {
            **_SETTINGS,
            "text.color": ink,
            "axes.labelcolor": muted,
            "axes.edgecolor": line,
            "axes.titlecolor": ink,
            "axes.facecolor": "none",
            "xtick.color": muted,
            "ytick.color": muted,
            "grid.color": line,
        }


def themes() -> tuple[Theme, ...]:
    """Light and dark, as the style sheet has them."""
    found = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    colours = [dict(re.findall(r"--(\w+): (#\w+);", block)) for block in found]
    light, dark = colours[0], {**colours[0], **colours[1]}
    return Theme("light", light), Theme("dark", dark)
