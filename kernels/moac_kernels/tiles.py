"""Tile sizes for each architecture, chosen so that nothing spills and loads stay in flight.

Decode: 16 KiB of keys and as much of values a tile, three stages deep, lets three programs share
an SM of 228 KiB; where an SM has 100 KiB the tiles are half as long and two programs share it.
Prefill: 128 queries over eight warps keep the accumulator in 64 registers a thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from moac_kernels.shape import KernelShape, padded

SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory a block may use, by compute capability."""

ARCHS = tuple(SHARED_LIMITS)
_SMALL = 101376


@dataclass(frozen=True, slots=True)
class Tile:
    """Constants of a kernel, warps a program, and stages of its software pipeline.

    `max_registers` a thread, where the assembler must not spill to fit one program more.
    """

    constants: dict[str, int | bool]
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def tiles(shape: KernelShape, shared_limit: int) -> dict[str, Tile]:
    """The tile of every kernel, by name, where a block may use `shared_limit` bytes."""
    small = shared_limit <= _SMALL
    head_tile, prefill = Tile({"HEAD_TILE": 8}, 4, 1), _prefill(shape, small)
    norm = Tile({}, _warps(shape.hidden_size), 1)
    return {
        "decode": _decode(shape, small),
        "combine": Tile({}, 4, 1),
        "prefill": prefill,
        "prefill_past": prefill,
        "rope": head_tile,
        "rope_decode": head_tile,
        "qk_norm": Tile({}, _warps(shape.num_heads * shape.head_dim), 1),
        "kv_write": Tile({"KV_TILE": padded(shape.num_kv_heads)}, 4, 1),
        "rms_norm": norm,
        "layer_norm": norm,
        "add_rms_norm": norm,
        "add_layer_norm": norm,
        "add": norm,
        "act_mul": Tile({"BLOCK": 1024}, 4, 1),
    }


def _decode(shape: KernelShape, small: bool) -> Tile:
    tile_bytes = 8192 if small else 16384
    tokens = tile_bytes // (shape.dim_tile * shape.itemsize)
    return Tile({"BLOCK_N": max(16, min(tokens, 128))}, 4, 3)


def _warps(width: int) -> int:
    """Of a program that holds a row of `width` numbers."""
    return 4 if width <= 2048 else 8


def _prefill(shape: KernelShape, small: bool) -> Tile:
    if shape.itemsize == 4:  # for tests: no tensor cores, so the tile must be small
        return Tile({"BLOCK_M": 32, "BLOCK_N": 32}, 8, 1)
    wide = shape.dim_tile > 128
    if small:
        warps, stages = (8, 1) if wide else (4, 2)
        constants = {"BLOCK_M": 64, "BLOCK_N": 32}
        return Tile(constants, warps, stages, max_registers=224)
    block_m = 64 if wide else 128
    block_n = 32 if wide else 64
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n}, 8, 2)
