"""Write docs/MODELS.md: every family that is served, measured against transformers.

    python tools/models.py docs/MODELS.md

The tiny random models are those of the tests (tests/families.py), and so is what measures them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from measured_families import BACKENDS, CASES, LENGTH, Measured, measure, name_of

HEAD = """\
# Models

`make models` writes this page. It makes a tiny random model of every family, in float32, with few
layers and every option of the family at a value that shows. Each backend runs it beside
transformers' own: {length} tokens, by prefill and by decode steps, with nothing dropped and under
a plan that leaves one head of each layer a quarter of them. A figure is the largest difference of
any logit. The last two columns are the largest difference between prefill and decode, and the
largest that the plan makes past its spans, which the other figures would show if it were not run.

`moac check MODEL` says of a checkpoint what this page says of the tiny ones.

"""
MIDDLE = """
The options of each model beside those of the plainest decoder, and the backends that refuse it.
The kernels of `cuda` are run beside transformers in Triton's interpreter, on the models that it
does not refuse (`tests/test_cuda_session.py`):

"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case and write the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("page", type=Path)
    options = parser.parse_args(argv)
    options.page.write_text(page([measure(*case) for case in CASES]), encoding="utf-8")


def page(found: Sequence[Measured]) -> str:
    """The whole page."""
    figures = table(
        ("family", "`model_type`", "RoPE", *BACKENDS, "prefill, decode", "dropped"),
        (figures_of(one) for one in found),
    )
    options = table(
        ("`model_type`", "RoPE", "options", "refused by"), (options_of(one) for one in found)
    )
    return HEAD.format(length=LENGTH) + figures + MIDDLE + options


def figures_of(one: Measured) -> Iterator[str]:
    """A row of the first table."""
    yield from (name_of(one.family), f"`{one.family}`", one.rope)
    yield from (told(one.errors[backend]) for backend in BACKENDS)
    yield from (told(one.steps), told(one.drops))


def options_of(one: Measured) -> Iterator[str]:
    """A row of the second table."""
    yield from (f"`{one.family}`", one.rope, "; ".join(one.options))
    reasons = {**one.errors, "cuda": one.cuda}
    refused = [f"{name}: {why}" for name, why in reasons.items() if isinstance(why, str)]
    yield "; ".join(refused) or "none"


def told(value: float | str) -> str:
    """A difference, "no" where there is none."""
    return "no" if isinstance(value, str) else f"{value:.1e}"


def table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main()
