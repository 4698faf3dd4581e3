"""The project's targets, and whether what was measured holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

_LARGE = 64 * 10**6  # bytes of a decode call from which on the bandwidth is what counts
_LONG = 16384  # tokens of a prefill from which on sparsity must pay


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """`{"target", "wanted", "found", "held"}` of each target; None where nothing tells."""
    good = [row for row in rows if "left_out" not in row and "said" not in row]
    return [
        _least("decode attention, of copy bandwidth, calls of 64 MB and more", 0.85, good, _large),
        _least("decode attention llama3-8b b1 32k, of copy bandwidth", 0.70, good, _single),
        _pairs("decode of differing spans, time of a uniform window's", 1.05, good),
        _least("decode step at batch 8 and more, of copy bandwidth", 0.75, good, _step),
        _against("hf", 10, good),
        _against("hf-static", 2.5, good),
        _against("dense", 1.6, good, lambda row: row["kv_bytes"] > row["weight_bytes"]),
        _against("hf-uniform", 1.1, good),
        _least("prefill, FLOP/s on visited tiles of SDPA's", 0.9, good, _flops),
        _least("prefill at density 1, times as fast as SDPA", 1.0, good, _dense_prefill),
        _least("prefill of 16k and more, times density as fast as SDPA", 0.8, good, _long_prefill),
        _all_equal("correctness: layers, families, packages and compute-sanitizer", rows),
    ]


def _large(row: Row) -> float | None:
    big = row.get("bytes", 0) >= _LARGE and not _is_single(row)
    return row["of_bandwidth"] if big else None


def _is_single(row: Row) -> bool:
    return (row.get("shape"), row.get("batch"), row.get("tokens")) == ("llama3-8b", 1, 32768)


def _single(row: Row) -> float | None:
    return row["of_bandwidth"] if _is_single(row) else None


def _step(row: Row) -> float | None:
    ours = row.get("system") in ("moac", "dense", "uniform") and row["batch"] >= 8
    return row["of_bandwidth"] if ours else None


def _flops(row: Row) -> float | None:
    return row.get("flops_of_sdpa")


def _dense_prefill(row: Row) -> float | None:
    return row["times_sdpa"] if row.get("flops_of_sdpa") and row["kind"] == "dense" else None


def _long_prefill(row: Row) -> float | None:
    sparse = row.get("flops_of_sdpa") and row["kind"] == "spans" and row["tokens"] >= _LONG
    return row["times_sdpa"] * row["density"] if sparse else None


def _verdict(target: str, wanted: str, found: float | None, held: bool | None) -> Row:
    return {"target": target, "wanted": wanted, "found": found, "held": held}


def _least(
    target: str, wanted: float, rows: Sequence[Row], value: Callable[[Row], float | None]
) -> Row:
    found = min((v for row in rows if (v := value(row)) is not None), default=None)
    return _verdict(target, f">= {wanted}", found, None if found is None else found >= wanted)


def _pairs(target: str, wanted: float, rows: Sequence[Row]) -> Row:
    """The worst ratio of a call of differing spans to the uniform one beside it."""
    times = {(r["shape"], r["batch"], r["tokens"], r["kind"]): r["us"] for r in rows if "us" in r}
    ratios = [
        us / times[(*key, "uniform")]
        for (*key, kind), us in times.items()
        if kind == "spans" and (*key, "uniform") in times
    ]
    found = max(ratios, default=None)
    return _verdict(target, f"<= {wanted}", found, None if found is None else found <= wanted)


def _against(
    system: str, wanted: float, rows: Sequence[Row], counts: Callable[[Row], bool] | None = None
) -> Row:
    """Tokens per second of `moac` at the 7B shape, times those of `system`, at its worst."""
    speed = {
        (row["shape"], row["context"], row["system"]): row
        for row in rows
        if row.get("system") and row["shape"] in ("vicuna-7b", "tiny")
    }
    ratios = []
    for (shape, context, name), row in speed.items():
        ours = speed.get((shape, context, "moac"))
        if name == system and ours is not None and (counts is None or counts(row)):
            ratios.append(ours["tokens_per_s"] / row["tokens_per_s"])
    found = min(ratios, default=None)
    held = None if found is None else found >= wanted
    return _verdict(f"tokens/s of the 7B shape, times {system}", f">= {wanted}", found, held)


def _all_equal(target: str, rows: Sequence[Row]) -> Row:
    failed = [row["failed"] for row in rows if "failed" in row]
    found = float(sum(failed)) if failed else None
    return _verdict(target, "0 failed", found, None if found is None else found == 0)
