"""The page about the efforts, in Markdown: unseen wordings first, seen ones apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evaluated import DENSE
from made import UNIFORM
from pooled import Case, Kept, found, kept_gain, loss, text_loss
from told import origin_lines, percent, table

from moac.evaluation.wordings import SEEN, UNSEEN

WANTED = 0.85
_STAGES = ("rehearse", "calibrate", "profile", "predict", "refine", "optimise", "validate")


def criterion(result: Mapping[str, Any], wording: str = UNSEEN) -> list[Kept]:
    """How much of the last effort's gain over uniform each other one keeps."""
    *others, reference = result["efforts"]
    cases = _cases(result, "passkey", wording)
    if not cases:
        return []
    return [
        kept_gain(cases, effort, reference, baseline=UNIFORM, wanted=WANTED) for effort in others
    ]


def page(result: Mapping[str, Any]) -> str:
    """Everything that is told of a result, as far as it has got."""
    parts = [
        "# The efforts of `moac plan`",
        "\n".join([f"- command: `{result['command']}`", *origin_lines(result)]),
        _plans(result),
    ]
    if _cases(result, "passkey", UNSEEN):
        parts += [_criterion(result, UNSEEN), _passkeys(result, UNSEEN)]
    if _cases(result, "passkey", SEEN):
        parts += [_passkeys(result, SEEN), _criterion(result, SEEN)]
    if _cases(result, "nll", None):
        parts.append(_text(result))
    return "\n\n".join(parts) + "\n"


def _cases(
    result: Mapping[str, Any],
    task: str,
    wording: str | None,
    budget: float | None = None,
    length: int | None = None,
) -> list[Case]:
    return [
        case
        for case in result["cases"]
        if case["task"] == task
        and case.get("wording") == wording
        and budget in (None, case["budget"])
        and length in (None, case["length"])
    ]


def _plans(result: Mapping[str, Any]) -> str:
    rows = []
    for made in result["plans"]:
        counts = made["kept"]
        served = ", ".join(
            f"{c['kept']} of {c['kept'] + c['made']} {kind}" for kind, c in counts.items()
        )
        rows.append(
            [
                f"{made['budget']:g}",
                made["effort"],
                f"{made['seconds']:.0f}",
                *(f"{made['stages'].get(name, 0):.0f}" for name in _STAGES),
                f"{made['peak_memory_bytes'] / 2**30:.2f}",
                served,
                made["date"][:16].replace("T", " "),
            ]
        )
    header = ["budget", "effort", "seconds", *_STAGES, "peak GiB", "from the work folder", "made"]
    return (
        "## Plans\n\nSeconds of each stage. Each effort has a work folder of its own, from which "
        "its second plan takes what the first has made. The table tells how many results came "
        "from there, of those asked for: calibration is what calibrate, predict and validate ask "
        "for, profile what profile and refine do, loss what predict and validate do.\n\n"
        f"{table(header, rows)}"
    )


def _criterion(result: Mapping[str, Any], wording: str) -> str:
    rows = [
        [
            kept.method,
            f"{100 * kept.gain:+.1f}",
            f"{100 * kept.reference_gain:+.1f}",
            _ratio(kept),
            f"{100 * kept.margin:+.1f} ({_signed(kept.margin_ci95)})",
            kept.n,
            {None: "not told", True: "yes", False: "no"}[kept.held],
        ]
        for kept in criterion(result, wording)
    ]
    reference = result["efforts"][-1]
    header = ["effort", "its gain", f"{reference}'s gain", "ratio", "margin", "cases", "held"]
    return (
        f"## How much of the gain is kept, {wording} wordings\n\nGains are pass keys found beyond "
        f"{UNIFORM}'s, in points of percent, over all budgets, lengths and seeds together. "
        f"Wanted is a ratio of {WANTED:g} and more to {reference}'s; the margin is the gain less "
        f"{WANTED:g} of {reference}'s. Intervals are 95 %, of a bootstrap over cases, paired.\n\n"
        f"{table(header, rows)}"
    )


def _ratio(kept: Kept) -> str:
    if kept.ratio is None:
        return "-"
    if kept.ratio_ci95 is None:
        return f"{kept.ratio:.2f} (not bounded)"
    return f"{kept.ratio:.2f} ({kept.ratio_ci95[0]:.2f} to {kept.ratio_ci95[1]:.2f})"


def _signed(interval: Sequence[float]) -> str:
    return " to ".join(f"{100 * end:+.1f}" for end in interval)


def _passkeys(result: Mapping[str, Any], wording: str) -> str:
    methods = _methods(result)
    shares, losses = [], []
    for name, cases in _pools(result, "passkey", wording):
        head = [*name, found(cases, DENSE).n]
        shares.append([*head, *(_share(cases, method) for method in methods)])
        losses.append([*head, *(f"{loss(cases, method).value:.3f}" for method in methods)])
    header = ["budget", "tokens", "cases", *methods]
    return (
        f"## Pass keys found, {wording} wordings\n\nPercent with the 95 % interval (Wilson). A "
        "case that is asked at several budgets counts once, with its mean.\n\n"
        f"{table(header, shares)}\n\nMean loss of the right key's tokens, in nats:\n\n"
        f"{table(header, losses)}"
    )


def _share(cases: Sequence[Case], method: str) -> str:
    figure = found(cases, method)
    return percent(figure.value, figure.ci95)


def _text(result: Mapping[str, Any]) -> str:
    others = [name for name in _methods(result) if name != DENSE]
    rows = []
    for name, cases in _pools(result, "nll", None):
        cells = []
        for method in others:
            figure = text_loss(cases, method, less=DENSE)
            ends = "" if figure.ci95 is None else " ({:+.4f} to {:+.4f})".format(*figure.ci95)
            cells.append(f"{figure.value:+.4f}{ends}")
        dense = text_loss(cases, DENSE)
        rows.append([*name, dense.n, f"{dense.value:.4f}", *cells])
    header = ["budget", "tokens", "windows", DENSE, *others]
    return (
        "## Text\n\nNats a token over prose, code and documentation: dense, and each plan's loss "
        "less dense's on the same windows with its 95 % interval.\n\n"
        f"{table(header, rows)}"
    )


def _pools(
    result: Mapping[str, Any], task: str, wording: str | None
) -> Iterator[tuple[tuple[str, str], list[Case]]]:
    """Every budget and length, each budget's lengths together, and everything."""
    budgets, lengths = result["budgets"], result["lengths"]
    places: list[tuple[float | None, int | None]] = [
        (budget, length) for budget in budgets for length in (*lengths, None)
    ]
    for budget, length in [*places, (None, None)]:
        cases = _cases(result, task, wording, budget, length)
        if cases:
            name = ("all" if budget is None else f"{budget:g}", str(length or "all"))
            yield name, cases


def _methods(result: Mapping[str, Any]) -> list[str]:
    return [DENSE, UNIFORM, *result["efforts"]]
