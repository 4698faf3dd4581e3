"""The report: one page that stands alone and says what `moac inspect` says."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tiny import Compiled

from moac.cli.main import main
from moac.evaluation.results import Evaluation, Outcome, Result, summarise
from moac.show.inspection import inspect_package
from moac.show.report import REPORT, render_report, wording
from moac.show.report.charts import front_chart
from moac.show.report.heat_map import heat_map, step
from moac.show.report.svg import Scale, around, ticks
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.plan import Plan

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = '<script>alert("1")</script>&amp;"\'><img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"closed without being opened: {tag}"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element `tag`."""
        return [attributes for name, attributes in self.elements if name == tag]

    def within(self, tag: str) -> list[str]:
        """The texts that stand directly in an element `tag`."""
        return [text for where, text in self.texts if where == tag]

    @property
    def words(self) -> str:
        return re.sub(
            r"\s+", " ", " ".join(text for where, text in self.texts if where != "style")
        )


@pytest.fixture(scope="module")
def found(tiny_package: Compiled) -> dict[str, Any]:
    """What `moac inspect` tells of the tiny package; copy it to change it."""
    return inspect_package(tiny_package.package)


@pytest.fixture(scope="module")
def page(found: dict[str, Any]) -> Page:
    return Page(render_report(found))


def cells(found: dict[str, Any]) -> Iterator[tuple[int, int, int, int]]:
    """Length, layer, KV head and span of every cell."""
    for length in found["lengths"]:
        for layer, row in enumerate(found["spans"][str(length)]):
            for head, span in enumerate(row):
                yield length, layer, head, span


# ---- the package


def test_the_report_is_a_file_of_the_package(tiny_package: Compiled) -> None:
    artifact = open_artifact(tiny_package.package)
    assert artifact.files[REPORT].size == (tiny_package.package / REPORT).stat().st_size


def test_it_says_what_inspect_says(tiny_package: Compiled, found: dict[str, Any]) -> None:
    written = (tiny_package.package / REPORT).read_text(encoding="utf-8")
    assert written == render_report({**found, "build": None})  # which was not known yet
    assert str(tiny_package.package) not in written


def test_verdict_and_cost_are_kept(found: dict[str, Any]) -> None:
    assert found["verification"]["checks"]
    cost = found["build"]
    stages = ["load", "rehearse", "calibrate", "profile", "predict", "refine", "optimise"]
    stages += ["validate", "emit", "verify"]
    assert list(cost["seconds"]) == sorted(stages)  # as JSON keeps them
    assert cost["peak_memory_by_stage"].keys() == cost["seconds"].keys()
    assert cost["peak_memory_bytes"] == max(cost["peak_memory_by_stage"].values())


# ---- it stands alone


def test_it_loads_and_runs_nothing(page: Page) -> None:
    used = {tag for tag, _ in page.elements}
    assert used.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "use"})
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} has {name}"
            if name in {"href", "src", "action", "data", "xlink:href"}:
                assert value is not None
                assert value.startswith("#"), f"{tag} leads to {value}"
    policy = {a.get("http-equiv"): a.get("content") for a in page.all("meta")}
    assert policy["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_it_names_no_address(found: dict[str, Any]) -> None:
    text = render_report(found)
    assert "//" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "@import" not in text
    assert "url(" not in text


def test_it_has_a_light_and_a_dark_side(found: dict[str, Any]) -> None:
    light, dark = render_report(found).split("@media (prefers-color-scheme: dark) {", 1)
    named = re.compile(r"(--[a-z0-9]+): (#[0-9a-f]{6})")
    light_colours, dark_colours = dict(named.findall(light)), dict(named.findall(dark))
    assert light_colours.keys() == dark_colours.keys()
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", dark))
    assert used == light_colours.keys()
    assert contrast(light_colours["--ink"], light_colours["--page"]) > 7
    assert contrast(dark_colours["--ink"], dark_colours["--page"]) > 7
    for colours in (light_colours, dark_colours):
        for name in ("muted", "accent", "warm", "good", "bad"):
            assert contrast(colours[f"--{name}"], colours["--card"]) > 4.5, name
        for number in range(9):
            over = colours["--low" if number < 5 else "--high"]
            assert contrast(over, colours[f"--s{number}"]) > 4.5, number


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours as WCAG 2 defines it, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


# ---- it tells everything


def test_every_span_is_in_the_heat_maps(page: Page, found: dict[str, Any]) -> None:
    told = [text for text in page.within("title") if text.startswith("layer ")]
    expected = []
    for length, layer, head, span in cells(found):
        kept = f"all {length:,} tokens"
        if span < length:
            kept = f"{span:,} of {length:,} tokens ({wording.percent(span / length)})"
        expected.append(f"layer {layer}, KV head {head}: {kept}")
    assert sorted(told) == sorted(expected)
    numbers = [text for text in page.within("text") if text.isdecimal()]
    for _, _, _, span in cells(found):
        assert str(span) in numbers


def test_the_most_that_is_held_is_told_with_where_and_what_was_not_measured(
    page: Page, found: dict[str, Any]
) -> None:
    largest, profiled = found["largest_density"], found["planning"]["lengths"][-1]
    assert (
        f"From {largest['shortest']:,} to {largest['longest']:,} tokens at most "
        f"{wording.percent(largest['density'])} is kept, at {largest['length']:,} tokens."
    ) in page.words
    assert page.words.count(f"Past {profiled:,} tokens no loss was measured") == 1
    assert f"at every length from {largest['shortest']:,} tokens on" in page.words


def test_figures_are_those_of_inspect(page: Page, found: dict[str, Any]) -> None:
    table = set(page.within("td"))
    for length in found["lengths"]:
        held = found["kv_bytes"][str(length)]
        assert {f"{length:,} tokens", f"{found['density'][str(length)]:.4f}"} <= table
        assert {wording.size(held["held"]), wording.size(held["dense"])} <= table
    for row in found["planning"]["measured_loss"]:
        assert {wording.loss(value) for value in row["losses"].values()} <= table
        assert wording.loss(row["loss"]) in table
    for point in found["planning"]["front"]:
        assert {wording.loss(value) for value in point["losses"].values()} <= table
    for check in found["verification"]["checks"]:
        assert {check["name"], wording.short(check["value"])} <= table
    for name, seconds in found["build"]["seconds"].items():
        assert {name, wording.duration(seconds)} <= table
    assert found["provenance"]["identity"] in page.words
    for name, version in found["provenance"]["versions"].items():
        assert f"{name} {version}" in page.words
    assert set(found["provenance"]["arguments"]) <= set(
        re.findall(r"[a-z_]+", " ".join(page.within("span")))
    )


def test_the_chosen_plan_is_marked(page: Page, found: dict[str, Any]) -> None:
    chosen = next(p["plan"] for p in found["planning"]["front"] if p["chosen"])
    assert page.within("td").count(f"{chosen} (chosen)") == 2


def test_a_failed_check_says_so(found: dict[str, Any]) -> None:
    changed = copy.deepcopy(found)
    changed["verification"]["checks"] = [
        {"name": "golden", "ok": False, "value": 3.0, "limit": 2.0},
        {"name": "sparse differs", "ok": False, "value": 0.1, "limit": 2.0},
    ]
    words = Page(render_report(changed)).words
    assert "0 of 2 hold" in words
    assert "golden 3 at most 2 FAILED" in words
    assert "sparse differs 0.1 more than 2 FAILED" in words


# ---- what was not recorded is left out


@pytest.mark.parametrize(
    ("missing", "heading"),
    [("measured_loss", "What it costs in quality"), ("front", "How the plan was chosen")],
)
def test_a_section_without_data_is_left_out(
    found: dict[str, Any], missing: str, heading: str
) -> None:
    assert heading in render_report(found)
    changed = copy.deepcopy(found)
    del changed["planning"][missing]
    page = Page(render_report(changed))
    assert heading not in page.words
    assert "How far each head looks back" in page.words


def test_a_package_without_verdict_makes_no_promise(found: dict[str, Any]) -> None:
    changed = copy.deepcopy(found)
    del changed["verification"]["checks"]
    assert "hold" not in Page(render_report(changed)).within("dt")
    assert "Checks it passed" not in render_report(changed)


def test_one_plan_has_nothing_to_compare(found: dict[str, Any]) -> None:
    changed = copy.deepcopy(found)
    front = [p for p in changed["planning"]["front"] if p["chosen"]]
    changed["planning"]["front"] = front
    page = Page(render_report(changed))
    assert "It found 1 plan " in page.words
    assert "The Pareto front a line for each plan" not in page.words


def test_the_predicted_loss_stands_beside_the_measured_one(
    found: dict[str, Any], page: Page
) -> None:
    told, record = found["planning"]["predicted_loss"], found["planning"]
    assert "Predicted against measured loss" in page.within("h2")
    low, high = map(wording.change, told["interval"])
    assert f"interval {low} to {high}" in page.words
    titles = page.within("title")
    for rung in record["prediction"]["ladder"]:
        predicted, measured = wording.change(rung["predicted"]), wording.change(rung["measured"])
        assert f"{rung['plan']}: predicted {predicted}, measured {measured}" in titles
    for point in record["prediction"]["front"]:
        start = f"{point['plan']}: predicted {wording.change(point['loss'])}, measured"
        assert any(title.startswith(start) for title in titles)


def test_a_plan_without_a_prediction_tells_none(found: dict[str, Any]) -> None:
    changed = copy.deepcopy(found)
    for name in ("predicted_loss", "prediction", "front", "solver"):
        del changed["planning"][name]
    page = Page(render_report(changed))
    assert "Predicted against measured loss" not in page.within("h2")
    assert "What it costs in quality" in page.within("h2")


# ---- hostile words


def test_names_are_text_whatever_they_hold(found: dict[str, Any]) -> None:
    changed = copy.deepcopy(found)
    changed["provenance"]["source"] = HOSTILE
    changed["provenance"]["arguments"]["calibration"] = HOSTILE
    changed["model"]["family"] = HOSTILE
    text = json.dumps(changed["planning"])
    domain = next(iter(changed["planning"]["measured_loss"][0]["losses"]))
    changed["planning"] = json.loads(text.replace(f'"{domain}"', json.dumps(HOSTILE)))
    page = Page(render_report(changed))
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.elements)
    assert page.words.count(HOSTILE) >= 3


def test_a_name_that_no_file_can_hold(found: dict[str, Any], tmp_path: Path) -> None:
    from moac.show.report import write_report

    changed = copy.deepcopy(found)
    changed["provenance"]["source"] = "lone \ud800 surrogate"
    write_report(tmp_path, changed)
    assert "lone ? surrogate" in (tmp_path / REPORT).read_text(encoding="utf-8")


# ---- pictures


def test_a_large_model_has_every_cell_and_no_number() -> None:
    spans = [[128 * (1 + (layer + head) % 9) for head in range(32)] for layer in range(80)]
    picture = str(heat_map(spans, 1152, [None] * 80))
    assert picture.count("<rect") == 80 * 32
    assert "layer 79, KV head 31: 384 of 1,152 tokens (33.3 %)" in picture
    assert 'class="n' not in picture


def test_colours_are_eighths_and_one_for_everything() -> None:
    assert [step(span, 1024) for span in (1, 127, 128, 512, 1023, 1024)] == [0, 0, 1, 4, 7, 8]


def test_a_window_of_the_model_is_named() -> None:
    assert "64 of 128 tokens (50 %), the model's own window" in str(heat_map([[64]], 128, [64]))


def test_the_chosen_line_is_drawn_last() -> None:
    plans = {"plan 1": [0.1, 0.2], "plan 2": [0.2, 0.1]}
    picture = str(front_chart(["a", "b"], plans, "plan 1"))
    assert picture.index('"line other"') < picture.index('"line chosen"')


def test_scales_and_ticks() -> None:
    assert Scale(0, 2, 10, 30)(1) == 20
    assert Scale(1, 1, 10, 30)(1) == 20
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.013, 0.024) == pytest.approx([0.014, 0.016, 0.018, 0.02, 0.022, 0.024])
    assert ticks(3, 3) == [3]
    low, high = around([0.1, 0.3])
    assert (low, high) == (0.0, pytest.approx(0.324))
    assert around([-1.0, 1.0])[0] < -1


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (wording.size(0), "0 B"),
        (wording.size(1536), "1.5 KiB"),
        (wording.size(180 << 20), "180 MiB"),
        (wording.duration(0.724), "0.72 s"),
        (wording.duration(59.6), "1 min 0 s"),
        (wording.duration(7500), "2 h 5 min"),
        (wording.percent(0.48541), "48.5 %"),
        (wording.percent(1.0), "100 %"),
        (wording.change(-0.0123), "\N{MINUS SIGN}0.012"),
    ],
)
def test_wording(told: str, expected: str) -> None:
    assert told == expected


# --- with what an evaluation found


def evaluation_of(found: dict[str, Any]) -> dict[str, Any]:
    """What `moac eval --json` prints of the package, with figures made up."""
    plan = Plan.from_json({**found, "windows": found["model"]["windows"]})
    lengths, methods = found["lengths"][:2], ("moac", "dense", "uniform", "layerwise")
    results: list[Result] = []
    for place, method in enumerate(methods):
        for length in lengths:
            deep = [Outcome(float((i + place) % 4 > 0), 0.5, (i + 0.5) / 20) for i in range(20)]
            flat = [Outcome(None, 2.0 + place / 10 + i / 100) for i in range(5)]
            asked = [replace(o, part=part) for part in ("seen", "unseen") for o in deep]
            texts = [replace(o, part=kind) for kind in ("prose", "code") for o in flat]
            for task, outcomes in (("passkey", asked), ("ruler_vt", deep), ("nll", texts)):
                results += summarise(task, length, method, outcomes)
    record = {
        "seed": 3,
        "date": "2026-11-22T00:00:00+00:00",
        "machine": {"processor": "x86_64", "threads": 1, "device": "cpu"},
        "versions": {"moac": "0.1.0"},
        "package": {"identity": found["provenance"]["identity"]},
    }
    density = {method: {n: plan.density(n) for n in lengths} for method in methods}
    stated = Evaluation(tuple(results), (), {}, density, record).to_json()
    return dict(json.loads(json.dumps(stated)))


def test_an_evaluation_adds_quality_by_length_and_depth_with_intervals(found):
    evaluation = evaluation_of(found)
    page = Page(render_report(found, evaluation))
    lengths = found["lengths"][:2]
    charts = [svg["aria-label"] for svg in page.all("svg")]
    kinds = ["passkey (unseen)", "passkey (seen)", "nll", "nll (prose)", "nll (code)"]
    expected = [f"{kind} by length" for kind in kinds]
    for n in lengths:
        expected += [f"{kind} by depth at {n} tokens" for kind in kinds[:2]]
    assert [label for label in charts if label in expected] == expected
    assert not [label for label in charts if label and "ruler_vt" in label]
    for method in ("moac", "dense", "uniform", "layerwise"):
        ranges = [line for line in page.all("line") if line["class"] == f"range q-{method}"]
        assert len(ranges) == (5 + 2 * 5) * len(lengths)
    passkey = next(r for r in evaluation["results"] if r["task"] == "passkey")
    low, high = passkey["ci95"]
    assert f"{passkey['value']:.2f} [{low:.2f}, {high:.2f}]" in page.within("td")
    assert {"ruler_vt", *kinds} <= set(page.within("td"))
    told = "in words that\ncalibration, from which the plan was made, never uses"
    assert told in render_report(found, evaluation)
    assert "Quality by length and depth" not in render_report(found)


def test_methods_differ_by_shape_too(found):
    text = render_report(found, evaluation_of(found))
    for tag, method in (
        ("circle", "moac"),
        ("circle", "dense"),
        ("rect", "uniform"),
        ("polygon", "layerwise"),
    ):
        assert f'<{tag} class="q-{method}"' in text


def test_every_figure_stays_inside_its_chart(found):
    charts = re.findall(r"<svg.*?</svg>", render_report(found, evaluation_of(found)))
    for chart in charts:
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', chart).groups())
        for x, y in re.findall(r'cx="(\S+)" cy="(\S+)"', chart):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def report(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and everything printed of `moac report`."""
    with pytest.raises(SystemExit) as left, redirect_stderr(StringIO()) as told:
        main(["report", *map(str, arguments)])
    return int(left.value.code or 0), told.getvalue()


def test_the_command_writes_the_page_beside_the_package(tiny_package, found, tmp_path):
    results, out = tmp_path / "results.json", tmp_path / "page.html"
    results.write_text(json.dumps(evaluation_of(found)))
    before = (tiny_package.package / REPORT).read_bytes()
    assert report(tiny_package.package, "--eval", results, "-o", out) == (0, "")
    assert out.read_text(encoding="utf-8") == render_report(found, evaluation_of(found))
    assert (tiny_package.package / REPORT).read_bytes() == before
    assert report(tiny_package.package, "-o", out) == (0, "")
    assert out.read_text(encoding="utf-8") == render_report(found)


def test_the_command_refuses_to_write_into_the_package(tiny_package):
    code, told = report(tiny_package.package, "-o", tiny_package.package / REPORT)
    assert code == 2
    assert "is inside the package" in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["package"].update(identity="0"), "an evaluation of another package"),
        (
            lambda e: e["density"]["moac"].update({"256": 0.123}),
            "an evaluation of another package",
        ),
        (lambda e: e.pop("density"), "is not what `moac eval PACKAGE --json` prints"),
        (lambda e: e["results"].pop(), "is not what `moac eval PACKAGE --json` prints"),
        (
            lambda e: e["results"][0].update(ci95=7),
            "is not what `moac eval PACKAGE --json` prints",
        ),
    ],
)
def test_an_evaluation_that_does_not_fit_is_told(tiny_package, found, tmp_path, change, message):
    evaluation, results = evaluation_of(found), tmp_path / "results.json"
    change(evaluation)
    results.write_text(json.dumps(evaluation))
    code, told = report(tiny_package.package, "--eval", results, "-o", tmp_path / "page.html")
    assert code == 2
    assert message in told
    assert not (tmp_path / "page.html").exists()


def test_results_that_are_not_there_are_told(tiny_package, tmp_path):
    missing = tmp_path / "missing.json"
    code, told = report(tiny_package.package, "--eval", missing, "-o", tmp_path / "page.html")
    assert (code, told) == (
        2,
        f"error: {missing} cannot be read (No such file or directory); name a results file\n",
    )


def test_a_record_without_how_it_was_predicted_shows_no_prediction(found):
    changed = copy.deepcopy(found)
    changed["planning"].pop("prediction")
    assert "Predicted against measured" not in render_report(changed)
