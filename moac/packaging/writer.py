"""The files of a package, written into a staging folder (see `staging.staged`)."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moac.packaging.build_record import BUILD
from moac.packaging.four_bits import WORD
from moac.packaging.quantise import quantised
from moac_runtime import errors as runtime_module
from moac_runtime.errors import CheckpointError
from moac_runtime.package.artifact import PLAN, WEIGHT_INDEX
from moac_runtime.package.golden import GOLDEN, GoldenPrompt
from moac_runtime.package.integrity import MANIFEST, hash_files, package_files
from moac_runtime.package.manifest import FORMAT, SCHEMA_VERSION, manifest_digest, minimum_reader
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.weight_formats import weight_formats

DEFAULT_SHARD_SIZE = 10**9

_MAIN = '''\
"""`python PACKAGE`: run this package with the runtime it carries."""

import os
import sys
from pathlib import Path

# Byte code lies with the user: what somebody put beside the sources, listed nowhere, is not run.
_CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
sys.pycache_prefix = f"{_CACHE}/moac/bytecode" if os.path.isabs(_CACHE) else os.devnull

from moac_runtime.command import main

raise SystemExit(main(package=Path(__file__).resolve().parent))
'''


def write_weights(
    staging: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    weights: str = "full",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
) -> int:
    """Write `(name, tensor)` pairs as `dtype` in shards and an index; return the tensors' bytes.

    With `weights` "int8" or "int4" matrices, as `dtype` has them, go into fewer bits, unless
    they come as words of 4 bits. Holds one shard in memory. A shard passes `max_shard_size` bytes
    only where one tensor does. Raises CheckpointError for a value `dtype` cannot hold, OSError.
    """
    folder = staging / "weights"
    folder.mkdir()
    shards: list[list[str]] = []
    total = 0
    cast = _cast(tensors, dtype)
    for shard in _shards(cast if weights == "full" else quantised(cast, weights), max_shard_size):
        _save(shard, _part(folder, len(shards)), {"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    _write_index(staging, _named(folder, shards), total)
    return total


def write_plan(staging: Path, plan: Plan, record: Mapping[str, Any]) -> None:
    """Write `plan.json`: the rules, and beside them the record of how they were found."""
    rules = plan.to_json()
    if clash := sorted(rules.keys() & record.keys()):
        raise ValueError(f"the planning record must not hold the plan's own fields, got {clash}")
    write_json(staging / PLAN, {**record, **rules})


def write_golden(staging: Path, prompts: Sequence[GoldenPrompt]) -> None:
    """Write `golden.safetensors`; raises ValueError where there is no prompt."""
    if not prompts:
        raise ValueError("a package must hold at least one golden prompt")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for number, prompt in enumerate(prompts):
        tensors[f"{number}.tokens"] = prompt.tokens.to(torch.int64).contiguous()
        tensors[f"{number}.positions"] = prompt.positions.to(torch.int64).contiguous()
        tensors[f"{number}.logits"] = prompt.logits.to(torch.float32).contiguous()
        if prompt.source is not None:
            tensors[f"{number}.source"] = prompt.source.to(torch.float32).contiguous()
        metadata[f"{number}.capacity"] = str(prompt.capacity)
    _save(tensors, staging / GOLDEN, metadata)
    _sort_header(staging / GOLDEN)


def embed_runtime(staging: Path) -> None:
    """Copy the runtime's sources and write `__main__.py`, so that `python PACKAGE` runs."""
    source, target = Path(runtime_module.__file__).parent, staging / "moac_runtime"
    for name in package_files(source):
        if name.endswith((".py", "py.typed", ".html")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    (staging / "__main__.py").write_text(_MAIN, encoding="utf-8")


def write_manifest(
    staging: Path,
    *,
    model: ModelSpec,
    dtype: str,
    capacity: int,
    head_order: Sequence[Sequence[int]],
    targets: Sequence[str],
    provenance: Mapping[str, Any],
    verification: Mapping[str, Any],
    weights: str = "full",
    kv_format: str | None = None,
) -> str:
    """Write `moac.json` over all that the folder holds but itself and `build.json`; its digest.

    Writing it again replaces it. `weights`: "full", "int8" or "int4". `kv_format`:
    `artifact.kv_format` of the plan, None for one that rounds nothing. Raises ValueError for a NaN
    in the records, OSError.
    """
    names = [name for name in package_files(staging) if name not in (MANIFEST, BUILD)]
    content = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "minimum_reader": minimum_reader(kv_format or dtype),
        "model": model.to_json(),
        "dtype": dtype,
        "kv_format": kv_format or dtype,
        "weight_formats": weight_formats(model, weights, dtype),
        "capacity": capacity,
        "head_order": head_order,
        "targets": targets,
        "files": {name: asdict(record) for name, record in hash_files(staging, names).items()},
        "provenance": dict(provenance),
        "verification": dict(verification),
    }
    data = json.loads(json.dumps(content, allow_nan=False))  # what a reader will see
    digest = manifest_digest(data)
    write_json(staging / MANIFEST, data | {"digest": digest})
    return digest


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON that is the same for the same data: keys sorted, two spaces, one final newline.

    Raises ValueError for a NaN or an infinity, which JSON lacks.
    """
    text = json.dumps(data, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _cast(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if tensor.dtype == WORD:
            yield name, tensor
            continue
        cast = tensor.to(dtype).contiguous()
        if not bool(torch.isfinite(cast).all()):
            raise CheckpointError(
                f"{name} holds values that are not finite as {str(dtype).removeprefix('torch.')}, "
                "expected finite weights: choose --dtype bfloat16 or float32, or download the "
                "checkpoint again"
            )
        yield name, cast


def _shards(
    tensors: Iterable[tuple[str, Tensor]], max_shard_size: int
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_size:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.part"


def _named(folder: Path, shards: Sequence[Sequence[str]]) -> dict[str, str]:
    """Give the shards their names, now that their count is known; return each tensor's file."""
    placed: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _part(folder, number).rename(folder / file)
        placed |= dict.fromkeys(names, file)
    return placed


def _write_index(staging: Path, placed: dict[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    write_json(staging / WEIGHT_INDEX, index)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        # safetensors wraps what the system said; a full disk must stay recognisable.
        if code := re.search(r"os error (\d+)", str(error)):
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _sort_header(path: Path) -> None:
    """Put the metadata in order: safetensors shuffles it, and equal input gives equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))  # a header may end in spaces
