"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes in the largest unit of 1024 that leaves at least one: `87.4 MiB`."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} B" if power == 0 else f"{_significant(count)} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """`0.72 s`, `45 s`, `6 min 59 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def tokens(count: int) -> str:
    """`8,192`."""
    return f"{count:,}"


def percent(share: float) -> str:
    """`50 %`, `48.5 %`."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def loss(value: float) -> str:
    """Nats, to the third decimal."""
    return f"{value:.3f}"


def change(value: float) -> str:
    """A difference with its sign, to the third decimal."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def short(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def _significant(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


FILTERS: dict[str, Callable[..., Any]] = {
    made.__name__: made for made in (size, duration, tokens, percent, loss, change, short)
}
