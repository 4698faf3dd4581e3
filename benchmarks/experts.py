"""What a decode step of a mixture of experts reads and takes, beside a dense model as wide.

    python benchmarks/experts.py .cache/experts

Random weights in bfloat16 on the native kernels: 8 experts of which a token goes to 2, about 10^9
weights in all, and a dense model whose MLPs are as wide as 2 experts together. Their files are
made in the folder given, some 2.7 GB, and taken again by a later run.

Read is what the kernel counts: the pages of the mapped weights that a step touched, by
/proc/self/clear_refs and smaps, so Linux alone. Steps of both models take turns.
"""

from __future__ import annotations

import argparse
import math
import mmap
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moac.bench.floor import kv_bytes_read, weight_bytes_read
from moac.packaging.fuse import head_order
from moac.progress.cost import parameters
from moac_kernels.cpu_build import build_cpu
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.library import open_library, runnable_sets
from moac_runtime.backends.cpu.session import CpuSession
from moac_runtime.backends.cpu.weights import address_of
from moac_runtime.backends.session import Feed
from moac_runtime.package.plan import Plan, dense_plan
from moac_runtime.package.spec import ExpertsSpec, LayerSpec, ModelSpec, NormSpec, RopeSpec
from moac_runtime.package.weights import expected_tensors

ITEMSIZE, PAGE, HEAD_DIM, LAYERS = 2, 4096, 64, 16
EXPERTS = ExpertsSpec(count=8, chosen=2, normalised=True)


def spec_of(layer: LayerSpec) -> ModelSpec:
    inv_freq = tuple(1e4 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2))
    return ModelSpec.of_layers(
        [layer] * LAYERS,
        family="mixtral",
        hidden_size=1024,
        num_heads=16,
        num_kv_heads=4,
        head_dim=HEAD_DIM,
        vocab_size=32000,
        context=4096,
        tied_embeddings=False,
        norm=layer.norm,
        ropes=(RopeSpec("default", 1e4, inv_freq),),
    )


def specs() -> dict[str, ModelSpec]:
    """The mixture, and the dense model of as many active weights but for routers."""
    mixed = LayerSpec(
        norm=NormSpec(1e-5),
        query_scale=HEAD_DIM**-0.5,
        intermediate_size=2304,
        activation="silu",
        experts=EXPERTS,
    )
    dense = replace(mixed, experts=None, intermediate_size=mixed.mlp_width)
    return {"mixture": spec_of(mixed), "dense": spec_of(dense)}


def places(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Each tensor's name, offset and count of numbers, every one from a page's start on."""
    offset = 0
    for name, shape in expected_tensors(spec).items():
        yield name, offset, math.prod(shape)
        offset += -(-math.prod(shape) * ITEMSIZE // PAGE) * PAGE


def write_weights(path: Path, spec: ModelSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for name, offset, count in places(spec):
            weight = torch.ones(count)
            if not name.endswith("norm.weight"):
                weight.normal_(0, 0.02, generator=generator)
            file.seek(offset)
            file.write(weight.bfloat16().view(torch.int16).numpy().tobytes())
        file.truncate(-(-file.tell() // PAGE) * PAGE)
    part.rename(path)


@dataclass(frozen=True, slots=True)
class Running:
    """A model in the middle of a text, its weights in a file of their own."""

    path: Path
    spec: ModelSpec
    plan: Plan
    session: CpuSession
    row: int

    def step(self) -> float:
        """Decode one token; its milliseconds."""
        started = time.perf_counter()
        self.session.step([Feed(self.row, [7])])
        return 1e3 * (time.perf_counter() - started)

    def read(self) -> int:
        """Decode one token; the bytes of weights that it touched, in whole pages."""
        Path("/proc/self/clear_refs").write_text("1")
        self.step()
        return touched(self.path)


def touched(path: Path) -> int:
    """Bytes of this process's maps of a file that were touched since all were forgotten."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split(maxsplit=1)[0]
        if not name.endswith(":"):
            ours = line.endswith(str(path))
        elif ours and name == "Referenced:":
            found += 1024 * int(line.split()[1])
    return found


def kernels() -> Any:
    """The native kernels, built for this processor."""
    best = runnable_sets(["cpu"])[0]
    with tempfile.TemporaryDirectory() as folder:
        build_cpu(Path(folder), [best])
        return open_library(Path(folder, f"{best}.so"))


def start(
    library: Any, path: Path, spec: ModelSpec, threads: int | None, context: int, more: int
) -> Running:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for offset in range(0, len(mapped), PAGE):
        # written, so that each page is this process's own: the kernel may hold a file's pages in
        # blocks of many and count a block as touched where one page of it is
        mapped[offset] = mapped[offset]
    base = address_of(mapped)
    addresses = {name: base + offset for name, offset, _ in places(spec)}
    engine = CpuEngine(library, spec, addresses, dtype="bfloat16", threads=threads, memory=mapped)
    heads = spec.num_layers, spec.num_kv_heads
    plan = dense_plan(*heads, sink=0, block=1, min_span=1, windows=spec.windows)
    session = CpuSession(engine, plan, head_order(plan))
    row = session.admit(context + more)
    tokens = torch.randint(0, spec.vocab_size, (context,)).tolist()
    session.step([Feed(row, tokens)])
    return Running(path, spec, plan, session, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=512, help="tokens before the steps")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    library, running, more = kernels(), {}, options.steps + 16
    for name, spec in specs().items():
        path = (options.folder / f"{name}.bf16").resolve()
        if not path.is_file():
            write_weights(path, spec)
        running[name] = start(library, path, spec, options.threads, options.context, more)
    for one in running.values():
        one.step()
    read = {name: [one.read() for _ in range(8)] for name, one in running.items()}
    took: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(options.steps):
        for name, one in running.items():
            took[name].append(one.step())
    print(f"{'':8} {'weights':>9} {'counted MB':>10} {'KV MB':>6} {'touched MB':>10} {'ms':>7}")
    for name, one in running.items():
        length = options.context + options.steps
        kv = kv_bytes_read(
            one.spec, one.plan, batch=1, capacity=length, length=length, itemsize=ITEMSIZE
        )
        counted, seen = weight_bytes_read(one.spec, ITEMSIZE), statistics.mean(read[name])
        print(
            f"{name:8} {parameters(one.spec) / 1e6:>7.0f} M {counted / 1e6:>10.1f} "
            f"{kv / 1e6:>6.1f} {seen / 1e6:>10.1f} {statistics.median(took[name]):>7.2f}"
        )
    of_bytes = statistics.mean(read["mixture"]) / statistics.mean(read["dense"])
    of_time = statistics.median(took["mixture"]) / statistics.median(took["dense"])
    print(f"mixture / dense: {of_bytes:.3f} of the bytes touched, {of_time:.3f} of the time")


if __name__ == "__main__":
    main()
