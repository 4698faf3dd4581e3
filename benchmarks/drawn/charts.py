"""The charts, each a figure of matplotlib in one theme's colours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from drawn import measured
from drawn.measured import Point
from drawn.theme import Theme

BLOCK, KV_HEADS = 64, 3  # of the influence tables
_PLANS = {"moac": ("moac", "accent", "o"), "uniform": ("one span for all heads", "warm", "s")}
_SYSTEMS = {
    "hf": ("transformers", "good", "^"),
    "llamacpp": ("llama.cpp", "warm", "s"),
    "dense": ("our kernels, dense", "muted", "D"),
    "moac": ("moac", "accent", "o"),
}
_LEGEND: dict[str, Any] = {"loc": "outside upper center", "ncols": 4}
_DOMAINS = ("retrieval", "documents", "text")


def quality(theme: Theme) -> Figure:
    """Pass keys found and the loss of text against the memory held, a column for each length."""
    keys, text = measured.quality("exact_match"), measured.quality("nll")
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    rows = figure.subplots(2, len(keys), sharex=True, squeeze=False)
    for axes, (length, plans) in zip(rows[0], keys.items(), strict=True):
        axes.set_title(f"{length:,} tokens")
        _plans(axes, theme, plans, scale=100, intervals=True)
        axes.set_ylim(0, 100)
    for axes, plans in zip(rows[1], text.values(), strict=True):
        _plans(axes, theme, plans, scale=1, intervals=False)
        axes.set_xticks([25, 50, 100])
    rows[0][0].set_ylabel("pass keys found, %")
    rows[1][0].set_ylabel("loss of text, nats a token\n(lower is better)")
    figure.supxlabel("KV memory held, % of the dense model's", color=theme["muted"], fontsize=10)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles[1:] + handles[:1], labels[1:] + labels[:1], **_LEGEND)
    return figure


def _plans(
    axes: Axes,
    theme: Theme,
    plans: Mapping[str, Sequence[Point]],
    *,
    scale: float,
    intervals: bool,
) -> None:
    for name, (label, colour, marker) in _PLANS.items():
        points = plans[name]
        axes.errorbar(
            [100 * point.density for point in points],
            [scale * point.value for point in points],
            yerr=_reach(points, scale) if intervals else None,
            color=theme[colour],
            marker=marker,
            capsize=3,
            elinewidth=1,
            label=label,
        )
    for point in plans.get("dense", ()):
        axes.plot(100, scale * point.value, "D", color=theme["muted"], label="dense model")
        axes.axhline(scale * point.value, color=theme["muted"], linewidth=1, linestyle=(0, (6, 4)))


def _reach(points: Sequence[Point], scale: float) -> list[list[float]]:
    """How far each interval reaches below and above its figure."""
    below = [scale * (point.value - point.low) for point in points]
    return [below, [scale * (point.high - point.value) for point in points]]


def speed(theme: Theme) -> Figure:
    """Prefill, a decode step and peak memory against the context, for one sequence."""
    systems = measured.speed(batch=1)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    prefill, step, peak = figure.subplots(1, 3)
    for system, (label, colour, marker) in _SYSTEMS.items():
        look: dict[str, Any] = {"color": theme[colour], "marker": marker, "label": label}
        prefill.plot(*_over_context(systems[system], "prefill_s"), **look)
        step.plot(*_over_context(systems[system], "decode_ms_p50"), **look)
        peak.plot(*_over_context(systems[system], "peak_bytes", unit=1 << 20), **look)
    names = ("prefill, s", "a decode step, ms", "peak memory, MiB")
    for axes, name in zip((prefill, step, peak), names, strict=True):
        axes.set_title(name)
        axes.set_xticks([256, 4096, 8000], ["256", "4,096", "8,000"])
    _logarithmic(prefill, (0.1, 1, 10))
    _logarithmic(step, (10, 30, 100))
    peak.set_ylim(bottom=0)
    figure.supxlabel("tokens of context", color=theme["muted"], fontsize=10)
    handles, labels = step.get_legend_handles_labels()
    figure.legend(handles, labels, **_LEGEND)
    return figure


def _over_context(
    rows: Iterable[Mapping[str, Any]], figure: str, *, unit: float = 1
) -> tuple[list[int], list[float]]:
    found = [(row["context"], row[figure] / unit) for row in rows]
    return [context for context, _ in found], [value for _, value in found]


def _logarithmic(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def influence(theme: Theme) -> Figure:
    """What every KV head is predicted to lose under each span; three of them stand out."""
    table = measured.influence("retrieval@4096")[:, 2:]  # no span is as small as the sink
    spans = BLOCK * np.arange(2, table.shape[1] + 2)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for losses in table:
        axes.plot(spans, losses, color=theme["other"], linewidth=0.6, alpha=0.45)
    for head, colour in _examples(table).items():
        axes.plot(spans, table[head], color=theme[colour], label=_named(head))
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_ylim(bottom=0)
    axes.set_yticks([0, 0.001, 0.01, 0.1], ["0", "0.001", "0.01", "0.1"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks([128, 1024, 2048, 3072, 4096], ["128", "1,024", "2,048", "3,072", "4,096"])
    axes.set_xlabel("span of the head, tokens")
    axes.set_ylabel("predicted loss, relative")
    figure.legend(**_LEGEND)
    return figure


def _examples(table: npt.NDArray[np.float64]) -> dict[int, str]:
    """The head that loses most under half of the text, the least of all, and one in between."""
    half = table[:, table.shape[1] // 2]
    order = np.argsort(half, kind="stable")
    middle = order[len(order) // 2]
    return {int(order[-1]): "warm", int(middle): "accent", int(order[0]): "good"}


def _named(head: int) -> str:
    return f"layer {head // KV_HEADS}, KV head {head % KV_HEADS}"


def prediction(theme: Theme) -> Figure:
    """Loss measured against loss predicted, 60 plans, a panel for each kind of text."""
    plans = measured.prediction()
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    for axes, domain in zip(figure.subplots(1, len(_DOMAINS)), _DOMAINS, strict=True):
        axes.loglog(
            [plan["score"][domain] for plan in plans],
            [plan["increase"][domain] for plan in plans],
            marker="o",
            markersize=4,
            linestyle="none",
            color=theme["accent"],
        )
        axes.set_title(domain)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter("{x:g}")
    figure.supxlabel("predicted by influence", color=theme["muted"], fontsize=10)
    figure.supylabel("measured, nats a token", color=theme["muted"], fontsize=10)
    return figure
