"""The span heat map of `moac inspect`: every span, on any terminal and on none."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from tiny import Compiled, moac_command

from moac.show.inspection import inspect_package
from moac.show.terminal_map import PLAIN_WIDTH, Look, span_map


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "72")


def model(layers: int, heads: int, lengths: list[int]) -> dict[str, Any]:
    """As much of an inspection as the map needs; spans of every share, several times."""
    spans = {
        str(n): [[n * (1 + (layer + head) % 8) // 8 for head in range(heads)]
                 for layer in range(layers)]
        for n in lengths
    }  # fmt: skip
    grid = [[None] * heads] * layers
    return {"lengths": lengths, "rules": grid, "widths": grid, "spans": spans}


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("layer")]


def test_a_small_model_shows_every_span_in_tokens(
    tiny_package: Compiled, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspect_package(tiny_package.package)
    capsys.readouterr()
    assert moac_command("inspect", tiny_package.package) == 0
    shown = rows(capsys.readouterr().out)
    assert len(shown) == 2
    for layer, line in enumerate(shown):
        label, *numbers = re.findall(r"\d+", line)
        spans = [span for n in found["lengths"] for span in found["spans"][str(n)][layer]]
        assert (int(label), [int(n) for n in numbers]) == (layer, spans)


def test_signs_grow_with_the_share() -> None:
    found = model(1, 8, [64])
    found["spans"]["64"] = [[1, 8, 16, 24, 32, 40, 48, 63]]
    assert re.findall(r"[^\s\d]", rows(span_map(found, Look()))[0].removeprefix("layer")) == list(
        "·▁▂▃▄▅▆▇"
    )
    found["spans"]["64"] = [[64] * 8]
    assert rows(span_map(found, Look()))[0].count("█") == 8


@pytest.mark.parametrize("width", [40, 72, 99, 200])
@pytest.mark.parametrize(("layers", "heads"), [(2, 1), (30, 3), (32, 8), (80, 8), (32, 32)])
def test_it_fits_and_is_complete(layers: int, heads: int, width: int) -> None:
    lengths = [1024, 2048, 4096, 8192]
    text = span_map(model(layers, heads, lengths), Look(width=width))
    maps = text.split("\n\n", 1)[1]
    if width >= 50:
        assert max(map(len, maps.splitlines())) <= width
    signs = [c for line in rows(maps) for c in line.removeprefix("layer") if c in "·▁▂▃▄▅▆▇█"]
    assert len(signs) == layers * heads * len(lengths)
    assert len(rows(maps)) % layers == 0
    for length in lengths:
        assert maps.count(f"at {length}") == 1


def test_where_numbers_have_no_room_it_says_where_they_are() -> None:
    assert "--json" in span_map(model(32, 32, [1024, 2048]), Look())
    assert "--json" not in span_map(model(30, 3, [1024, 2048]), Look())


def test_colour_changes_nothing_but_colour() -> None:
    found = model(9, 3, [64, 128])
    plain, coloured = span_map(found, Look()), span_map(found, Look(colour=True))
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert len(set(re.findall(r"48;5;\d+", coloured))) == 9


def test_the_look_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Look.of(Terminal()) == Look(width=72, colour=True, blocks=True)
    assert Look.of(Terminal("ascii")) == Look(width=72, colour=True, blocks=False)
    assert Look.of(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) == Look(
        width=PLAIN_WIDTH, colour=False, blocks=True
    )
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Look.of(Terminal()).colour
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not Look.of(Terminal()).colour


def test_without_blocks_it_is_ascii() -> None:
    text = span_map(model(3, 3, [64]), Look(blocks=False))
    assert text.isascii()
    assert len(re.findall(r"[.,:=+*#@-]\s*\d", "\n".join(rows(text)))) == 9
