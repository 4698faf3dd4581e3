"""docs/MODELS.md: what `make models` writes, measured again, within its bounds."""

from __future__ import annotations

import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cpu_kernels import needs_avx2, needs_compiler
from measured_families import BACKENDS, CASES, Measured, measure

from moac.checkpoint.families import FAMILIES
from moac.pipeline.compiler import FLOAT32_LIMIT

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "MODELS.md").read_text(encoding="utf-8")
TOOL: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "models.py"))
FIGURE = re.compile(r"\d\.\de[+-]\d\d")
SHOWS = 100 * FLOAT32_LIMIT  # a plan moves logits by far more than any error

measured = cache(measure)


def figures(line: str) -> list[float]:
    return [float(found) for found in FIGURE.findall(line)]


@needs_compiler
@needs_avx2
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_model_is_the_librarys_on_every_backend(case: tuple[str, str]) -> None:
    found: Measured = measured(*case)
    errors = [error for error in found.errors.values() if not isinstance(error, str)]
    assert set(found.errors) == set(BACKENDS)
    assert max(*errors, found.steps) <= FLOAT32_LIMIT <= 2e-3
    assert found.drops > SHOWS


@needs_compiler
@needs_avx2
def test_the_page_is_what_the_command_writes() -> None:
    """But for the figures, which follow the processor."""
    written = TOOL["page"]([measured(*case) for case in CASES])
    assert FIGURE.sub("", written) == FIGURE.sub("", PAGE), "run: make models"


def test_figures_of_the_page_keep_the_bounds() -> None:
    rows = [line for line in PAGE.splitlines() if FIGURE.search(line)]
    assert len(rows) == len(CASES)
    for row in rows:
        *errors, drops = figures(row)
        assert len(errors) >= len(BACKENDS)
        assert max(errors) <= FLOAT32_LIMIT
        assert drops > SHOWS


def test_every_family_stands_there() -> None:
    named = re.findall(r"^\| [^|]+ \| `(\w+)` \|", PAGE, re.MULTILINE)
    assert set(named[1:]) == set(FAMILIES)
