"""Draw the pictures of README and docs, light and dark, from what was measured.

    python benchmarks/pictures.py docs/pictures

Everything comes from files of this repository; `drawn/measured.py` names them. Nothing is
measured here, and nothing that a file lacks is filled in.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
from drawn.charts import influence, prediction, quality, speed
from drawn.masks import masks
from drawn.spans import spans
from drawn.theme import Theme, themes
from matplotlib.figure import Figure

CHARTS: dict[str, Callable[[Theme], Figure]] = {
    "quality": quality,
    "speed": speed,
    "influence": influence,
    "prediction": prediction,
    "masks": masks,
}


def pictures() -> Iterator[tuple[str, str]]:
    """The name and the SVG of every picture."""
    for theme in themes():
        for name, chart in CHARTS.items():
            with matplotlib.rc_context(theme.settings()):
                yield f"{name}-{theme.name}.svg", _svg(chart(theme))
        yield f"spans-{theme.name}.svg", spans(theme)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    # neither date nor version, so that what is drawn again is the same
    metadata = {"Date": None, "Creator": None}
    figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def main() -> None:
    """Write every picture into the folder that is named."""
    parser = argparse.ArgumentParser(description="Draw the pictures of README and docs.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in pictures():
        (folder / name).write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
