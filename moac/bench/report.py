"""The result for people: one table, a line a row."""

from __future__ import annotations

from moac.bench.result import BenchResult, BenchRow
from moac.show.summary import table

_MIB = 1 << 20
_HEADER = (
    "system",
    "batch",
    "context",
    "dtype",
    "density",
    "bytes",
    "prefill s",
    "ms/step p50",
    "p95",
    "blocks",
    "tokens/s",
    "KV MiB",
    "peak MiB",
    "floor ms",
    "of floor",
)


def bench_table(result: BenchResult) -> str:
    """The machine, its measured bandwidth, and every row."""
    found = result.machine
    where = found["gpu"] or f"{found['processor']}, {found['threads']} threads"
    return (
        f"{where}, read bandwidth {result.bandwidth:.1f} GB/s\n\n"
        f"{table(_HEADER, [_cells(row) for row in result.rows])}"
    )


def _cells(row: BenchRow) -> tuple[object, ...]:
    low, high = row.decode_ms_blocks
    return (
        row.system,
        row.batch,
        row.context,
        row.dtype,
        f"{row.density:.3f}",
        f"{row.byte_share:.3f}",
        f"{row.prefill_s:.2f}",
        f"{row.decode_ms_p50:.2f}",
        f"{row.decode_ms_p95:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{row.tokens_per_s:.1f}",
        f"{row.kv_bytes / _MIB:.2f}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / _MIB:.0f}",
        f"{row.floor_ms:.2f}",
        f"{row.percent_of_floor:.0f} %",
    )
