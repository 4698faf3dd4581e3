"""The page itself: the template filled with figures and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from moac.show.report import wording
from moac.show.report.story import Story

REPORT = "report.html"
_TEMPLATE = "report.html.jinja"


def write_report(folder: Path, found: Mapping[str, Any]) -> None:
    """Write `report.html` into `folder`; `found` is what `inspect_artifact` tells of it."""
    (folder / REPORT).write_text(render_report(found), encoding="utf-8", errors="replace")


def render_report(found: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> str:
    """One HTML page without scripts that loads nothing; it names no path of the host.

    `evaluation`: what `moac eval --json` printed of the same package, as `read_evaluation` gives
    it; the page then shows quality by length and depth.
    """
    return _environment().get_template(_TEMPLATE).render(story=Story.of(found, evaluation))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("moac.show.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= wording.FILTERS
    return environment
