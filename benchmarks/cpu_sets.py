"""Decode and prefill on every instruction set and in every weight format, beside their floors.

    python benchmarks/cpu_sets.py full=out int8=out8 int4=out4 --gguf model-q8_0.gguf

Packages of one model, each on every instruction set that this processor has and the package was
built for, and llama.cpp on GGUF files of it (by llama-cpp-python), take turns in one run, each in
a process of its own. Decode stands beside the time to read weights and cache once at the measured
bandwidth, prefill beside the time of its multiply-adds at the measured peak of what they are
multiplied in. Prints a page; --out writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moac.bench.floor import floor_ms, kv_bytes_read
from moac.bench.machine import machine, read_bandwidth_gbs, versions
from moac.bench.system import Subject
from moac.bench.worker import Load, Worker
from moac.progress.cost import Costs
from moac_kernels.cpu_build import INSTRUCTION_SETS, SOURCES, find_compiler
from moac_runtime.backends.cpu.library import products, runnable_sets
from moac_runtime.host.cores import default_threads, set_torch_threads
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.dtypes import DTYPE_BYTES

DECODE = "1/256,1/4096,1/8000,8/4096"
PREFILL = "512,2048,8000"
STEPS = 8  # of a turn


@dataclass(frozen=True)
class Contender:
    """A way to run the model. `peak`: what its prefill is multiplied in, None of llama.cpp."""

    name: str
    system: str
    subject: Subject
    peak: str | None = None

    @property
    def density(self) -> float:
        """The share of keys that its plan attends to at the longest."""
        return self.subject.plan.density(self.subject.spec.context)


@dataclass
class Row:
    """What one contender took at a batch and context: seconds of prefills, ms of steps."""

    name: str
    batch: int
    context: int
    prefill_s: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    decode_floor_ms: float = 0.0
    prefill_floor_s: float = 0.0


def peaks(instruction_set: str, threads: int) -> dict[str, float]:
    """10^9 multiply-adds a second, by what is multiplied."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "peak")
        source = str(Path(__file__).with_name("peak.cpp"))
        flags = ("-std=c++17", "-O3", "-pthread", *INSTRUCTION_SETS[instruction_set])
        compiler = find_compiler(instruction_set) or "c++"
        subprocess.run(
            [compiler, *flags, "-I", str(SOURCES), source, "-o", str(program)], check=True
        )
        told = subprocess.run(
            [program, str(threads)], check=True, capture_output=True, text=True
        ).stdout
    return {name: float(figure) for name, figure in map(str.split, told.splitlines())}


def contenders(options: argparse.Namespace) -> Iterator[Contender]:
    """Every package on every set, then every GGUF."""
    for label, package in options.packages:
        artifact = open_artifact(package)
        found = runnable_sets(artifact.targets)
        for name in [n for n in found if options.sets is None or n in options.sets]:
            subject = Subject(
                spec=artifact.spec, plan=artifact.plan, dtype=artifact.dtype, device="cpu",
                backend="cpu", cpu=name, package=package, source=None, shape=None, gguf=None,
                threads=options.threads, seed=0,
            )  # fmt: skip
            # many tokens: 4-bit weights are unpacked for them
            peak = products(name, artifact.dtype, whole=artifact.weights == "int8")
            yield Contender(f"{name} {label}", "moac", subject, peak)
    artifact = open_artifact(options.packages[0][1])
    for gguf in options.gguf:
        subject = Subject(
            spec=artifact.spec, plan=artifact.plan, dtype=artifact.dtype, device="cpu",
            backend="cpu", cpu=None, package=options.packages[0][1], source=None, shape=None,
            gguf=gguf, threads=options.threads, seed=0,
        )  # fmt: skip
        yield Contender(f"llama.cpp {gguf.stem}", "llamacpp", subject)


def measure(
    field_: Sequence[Contender], batch: int, context: int, steps: int, repeats: int
) -> list[Row]:
    """Every contender in turns: a prefill each, then blocks of steps, if any."""
    load = Load(batch, context, context + max(steps, 1) + STEPS, 0)
    rows = [Row(contender.name, batch, context) for contender in field_]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(c.system, c.subject, load)) for c in field_]
        for _ in range(repeats):
            for worker, row in zip(workers, rows, strict=True):
                row.prefill_s.append(worker.prefill())
            for _ in range(0, steps, STEPS):
                for worker, row in zip(workers, rows, strict=True):
                    row.decode_ms += worker.decode(STEPS)
        usages = [worker.usage() for worker in workers]
    for contender, row, usage in zip(field_, rows, usages, strict=True):
        kv = usage.kv_bytes
        if contender.peak is not None:
            kv = kv_bytes_read(
                contender.subject.spec, contender.subject.plan, batch=batch,
                capacity=load.capacity, length=context + steps / 2,
                itemsize=DTYPE_BYTES[usage.dtype],
            )  # fmt: skip
        row.decode_floor_ms = usage.weight_bytes + kv
    return rows


def floored(
    rows: Sequence[Row], field_: Sequence[Contender], bandwidth: float,
    peak: dict[str, dict[str, float]],
) -> None:  # fmt: skip
    """Turn what each row reads and computes into the time it takes at best."""
    for row, contender in zip(rows, field_, strict=True):
        row.decode_floor_ms = floor_ms(row.decode_floor_ms, bandwidth)
        if contender.peak is not None:
            costs = Costs(contender.subject.spec, DTYPE_BYTES[contender.subject.dtype])
            adds = row.batch * costs.forward(row.context, contender.density) / 2
            figure = peak[contender.subject.cpu or ""][contender.peak]
            row.prefill_floor_s = adds / figure / 1e9


def page(rows: Sequence[Row], steps: bool) -> str:
    """A table in Markdown, in the order of the rows."""
    lines = [
        "| | batch | context | median | least | floor | of it |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        taken = row.decode_ms if steps else row.prefill_s
        floor = row.decode_floor_ms if steps else row.prefill_floor_s
        unit, median = ("ms" if steps else "s"), statistics.median(taken)
        share = f"{100 * floor / median:.0f} %" if floor else "-"
        lines.append(
            f"| {row.name} | {row.batch} | {row.context} | {median:.4g} {unit} | "
            f"{min(taken):.4g} {unit} | {floor:.3g} {unit} | {share} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    set_torch_threads(options.threads)
    field_ = list(contenders(options))
    bandwidth = read_bandwidth_gbs("cpu")
    sets = dict.fromkeys(c.subject.cpu for c in field_ if c.subject.cpu)
    peak = {name: peaks(name, options.threads) for name in sets}
    decode, prefill = [], []
    for batch, context in options.decode:
        decode += measure(field_, batch, context, options.steps, options.repeats)
        floored(decode[-len(field_) :], field_, bandwidth, peak)
        print(page(decode[-len(field_) :], steps=True), flush=True)
    for context in options.prefill:
        prefill += measure(field_, 1, context, 0, options.repeats)
        floored(prefill[-len(field_) :], field_, bandwidth, peak)
        print(page(prefill[-len(field_) :], steps=False), flush=True)
    if options.out is not None:
        found = {
            "machine": machine("cpu"), "versions": versions(), "command": sys.argv,
            "read_bandwidth_gbs": bandwidth, "peak": peak,
            "decode": list(map(asdict, decode)), "prefill": list(map(asdict, prefill)),
        }  # fmt: skip
        options.out.write_text(f"{json.dumps(found, indent=2)}\n", encoding="utf-8")
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("packages", nargs="+", type=_named, metavar="NAME=PACKAGE")
    add("--sets", type=lambda value: value.split(","), help="instruction sets (all here)")
    add("--gguf", type=Path, action="append", default=[], metavar="FILE", help="for llama.cpp")
    add("--decode", type=_pairs, default=_pairs(DECODE), metavar="BATCH/CONTEXT,...")
    add("--prefill", type=_counts, default=_counts(PREFILL), metavar="CONTEXT,...")
    add("--steps", type=int, default=32)
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=default_threads())
    add("--out", type=Path, metavar="FILE", help="the figures as JSON")
    return parser.parse_args(argv)


def _named(value: str) -> tuple[str, Path]:
    name, _, path = value.rpartition("=")
    return name or Path(path).name, Path(path)


def _counts(value: str) -> list[int]:
    return [int(part) for part in value.split(",") if part]


def _pairs(value: str) -> list[tuple[int, int]]:
    pairs = (part.split("/") for part in value.split(",") if part)
    return [(int(batch), int(context)) for batch, context in pairs]


if __name__ == "__main__":
    sys.exit(main())
