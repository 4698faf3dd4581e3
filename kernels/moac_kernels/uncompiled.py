"""Kernels as source alone: launch metadata with nothing compiled.

For Triton to build where they run; or, where `TRITON_INTERPRET=1` is set before Triton is
imported, to run on CPU tensors, so that a runtime is tested without a GPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from moac_kernels.build import PORTABLE, Built, write_sources
from moac_kernels.catalog import Kernel, kernels_of
from moac_kernels.shape import KernelShape
from moac_kernels.tiles import SHARED_LIMITS, Tile, tiles


def write_uncompiled(folder: Path, shape: KernelShape, *, block: int | None = None) -> list[Built]:
    """Write sources and metadata to `folder`, a package's `kernels/`.

    `block`: tokens of attention's tiles, None for those of the portable build; a small one lets
    short sequences cross the edges of tiles.
    """
    write_sources(folder, shape)
    target = folder / PORTABLE
    target.mkdir(exist_ok=True)
    chosen = tiles(shape, min(SHARED_LIMITS.values()))
    made = [_described(shape, kernel, chosen[kernel.name], block) for kernel in kernels_of(shape)]
    for built in made:
        text = json.dumps(asdict(built), indent=2, sort_keys=True)
        (target / f"{built.name}.json").write_text(f"{text}\n", encoding="utf-8")
    return made


def _described(shape: KernelShape, kernel: Kernel, tile: Tile, block: int | None) -> Built:
    edges = [name for name in tile.constants if name in ("BLOCK_M", "BLOCK_N")]
    small = {} if block is None else dict.fromkeys(edges, block)
    return Built(
        name=kernel.name,
        arch=PORTABLE,
        entry=kernel.entry,
        source=f"kernels/{kernel.source}.py",
        arguments=[[name, kind] for name, kind in kernel.signature(shape).items()],
        null_arguments=0,
        constants={**kernel.constants(tile.constants), **small},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
        registers=0,
        shared=0,
        spills=0,
        cubin=None,
        ptx=f"kernels/{PORTABLE}/{kernel.name}.ptx",
        driver=0,
        triton="",
    )
