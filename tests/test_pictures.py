"""The pictures of README and docs: as `make pictures` draws them, and of what was measured."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module, metadata
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest

from moac_runtime.package.plan import Plan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

pictures = import_module("pictures")
measured = import_module("drawn.measured")
themes = import_module("drawn.theme").themes

FOLDER = ROOT / "docs" / "pictures"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "BENCHMARKS.md", *(ROOT / "docs").rglob("*.md"))
}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    """Every picture as it is drawn today, by its name."""
    return dict(pictures.pictures())


def test_the_pictures_are_what_the_command_draws(drawn: dict[str, str]) -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(drawn)
    pinned = re.findall(
        r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    if [metadata.version("matplotlib")] != pinned:
        pytest.skip("another version of matplotlib draws the same in other bytes")
    for name, drawing in drawn.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == drawing, f"{name}; make pictures"


def test_a_picture_is_small_and_whole(drawn: dict[str, str]) -> None:
    for name, drawing in drawn.items():
        assert len(drawing) < 1 << 19, name
        root = fromstring(drawing)
        assert root.tag == f"{SVG}svg"
        assert not list(root.iter(f"{SVG}image")), "nothing that blurs when it grows"
        assert not re.search(r'(?:href|src)="(?!#)', drawing), "nothing from elsewhere"


def plain(drawing: str) -> str:
    """A drawing without colours, and without the names that matplotlib makes of them."""
    return re.sub(r"#[0-9a-f]{6}\b|\b[mp][0-9a-f]{10}\b", "", drawing)


def test_light_and_dark_differ_in_colours_alone(drawn: dict[str, str]) -> None:
    light, dark = themes()
    assert (light.name, dark.name) == ("light", "dark")
    assert light.colours.keys() == dark.colours.keys()
    names = {name.rpartition("-")[0] for name in drawn}
    for name in names:
        one, other = (drawn[f"{name}-{theme}.svg"] for theme in ("light", "dark"))
        assert one != other
        assert plain(one) == plain(other)


def test_every_picture_is_shown_light_and_dark(drawn: dict[str, str]) -> None:
    shown = set()
    for page, text in PAGES.items():
        for block in re.findall(r"<picture>(.*?)</picture>", text, re.DOTALL):
            dark, light = re.findall(r'src(?:set)?="([^"]+)"', block)
            assert dark.replace("-dark", "-light") == light
            assert 'media="(prefers-color-scheme: dark)"' in block
            assert re.search(r'alt="[^"]{20,}"', block), page
            shown |= {Path(dark).name, Path(light).name}
    assert shown == set(drawn)


def test_quality_is_what_the_evaluations_found() -> None:
    keys, text = measured.quality("exact_match"), measured.quality("nll")
    found = {
        (length, plan, round(point.density, 2)): point.value
        for length, plans in keys.items()
        for plan, points in plans.items()
        for point in points
    }
    for name in ("half", "quarter"):
        document = json.loads((RESULTS / f"eval-passkey-{name}-2026-11-22.json").read_text())
        for row in document["results"]:
            if row["metric"] != "exact_match" or "depth" in row:
                continue
            density = document["density"][row["method"]][str(row["length"])]
            key = (row["length"], row["method"], round(density, 2))
            assert found.pop(key) == row["value"]
    assert not found
    assert "dense" in text[2048]
    assert "dense" not in text[4096], "it was not measured, so there is nothing to draw"


def test_the_readme_s_figures_are_those_of_the_results() -> None:
    lines = re.findall(r"^\| (\d+) tokens \|(.*)\|$", PAGES[ROOT / "README.md"], re.MULTILINE)
    assert [length for length, _ in lines] == ["1024", "2048", "4096"]
    found = json.loads((ROOT / "benchmarks/results/efforts-2026-11-29.json").read_text())
    columns = [("dense", 0.5)]
    columns += [
        (name, budget) for budget in (0.5, 0.25) for name in ("uniform", *found["efforts"])
    ]
    for length, cells in lines:
        told = [cell.strip() for cell in cells.split("|")]
        for cell, (method, budget) in zip(told, columns, strict=True):
            scores = [
                case["score"][method]
                for case in found["cases"]
                if (case.get("wording"), case["length"], case["budget"])
                == ("unseen", int(length), budget)
            ]
            assert len(scores) == 20
            assert cell == f"{sum(scores) / len(scores):.0%}".replace("%", " %"), length


def test_the_map_shows_the_plan_s_spans(drawn: dict[str, str]) -> None:
    plan = Plan.from_json(json.loads((ROOT / "tests/golden/smollm2_plan.json").read_text()))
    root = fromstring(drawn["spans-light.svg"])
    shown = [
        int(text.text or "")
        for text in root.iter(f"{SVG}text")
        if re.fullmatch(r"n\d", text.attrib.get("class", ""))
    ]
    assert shown == [
        head.size for n in (1024, 2048, 4096) for layer in plan.spans(n) for head in layer
    ]
