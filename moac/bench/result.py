"""What a benchmark finds: a row a system, and the machine it was measured on."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moac.bench.floor import floor_ms, kv_bytes_read
from moac.bench.machine import versions
from moac.bench.system import Subject
from moac.bench.worker import Load, Usage


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One system at one batch and context; `to_json` is a row of the result."""

    system: str
    batch: int
    context: int
    dtype: str
    density: float
    byte_share: float
    prefill_s: float
    decode_ms_p50: float
    decode_ms_p95: float
    decode_ms_blocks: tuple[float, float]
    tokens_per_s: float
    kv_bytes: int
    peak_bytes: int | None
    read_bytes: int
    floor_ms: float

    @property
    def percent_of_floor(self) -> float:
        """The floor in percent of the median step: 100 would be reading at full bandwidth."""
        return 100 * self.floor_ms / self.decode_ms_p50

    def to_json(self) -> dict[str, Any]:
        """`decode_ms_blocks`: lowest and highest median of a block of steps.

        `density` is of tokens, `byte_share` of bytes, over what dense caches of the same numbers
        hold.
        """
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"decode_ms_blocks": list(self.decode_ms_blocks)}


@dataclass(slots=True)
class Times:
    """What was measured of one system: seconds of each prefill, milliseconds of each step."""

    prefill_s: list[float] = field(default_factory=list)
    blocks: list[list[float]] = field(default_factory=list)

    @property
    def steps(self) -> list[float]:
        """Every step's milliseconds."""
        return [step for block in self.blocks for step in block]


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Every row, and what the machine is. `bandwidth`: 10^9 bytes a second, measured."""

    machine: dict[str, Any]
    bandwidth: float
    rows: tuple[BenchRow, ...]
    date: str

    def to_json(self) -> dict[str, Any]:
        """The result as `moac bench --json` writes it."""
        return {
            "machine": self.machine,
            "read_bandwidth_gbs": self.bandwidth,
            "versions": versions(),
            "command": sys.argv,
            "date": self.date,
            "rows": [row.to_json() for row in self.rows],
        }


def measured_row(
    name: str, load: Load, subject: Subject, times: Times, usage: Usage, bandwidth: float
) -> BenchRow:
    """What was measured of one system. `bandwidth`: 10^9 bytes a second."""
    kv_read = kv_bytes_read(
        subject.spec,
        subject.plan,
        batch=load.batch,
        capacity=load.capacity,
        length=(load.context + load.capacity) / 2,  # the middle of the timed steps
        itemsize=usage.kv_itemsize,
    )
    kv = subject.spec.kv_shape(usage.kv_itemsize)
    median = statistics.median(times.steps)
    medians = [statistics.median(block) for block in times.blocks]
    read = usage.weight_bytes + kv_read
    return BenchRow(
        system=name,
        batch=load.batch,
        context=load.context,
        dtype=usage.dtype,
        density=subject.plan.density(load.capacity),
        byte_share=subject.plan.byte_share(load.capacity, kv),
        prefill_s=statistics.median(times.prefill_s),
        decode_ms_p50=median,
        decode_ms_p95=percentile(times.steps, 95),
        decode_ms_blocks=(min(medians), max(medians)),
        tokens_per_s=load.batch * 1e3 / median,
        kv_bytes=usage.kv_bytes,
        peak_bytes=usage.peak_bytes,
        read_bytes=round(read),
        floor_ms=floor_ms(read, bandwidth),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]
