"""What a model is, whatever files it lies in: its spec and the contents of its tensors.

Folder, shards, their order, files beside them and the library that wrote config.json are of no
account, nor is a second copy of tied embeddings. Another dtype of the stored weights is another
model, since it computes other numbers. Neither tokenizer nor chat template belongs to it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moac_runtime.errors import CheckpointError
from moac_runtime.package.records import to_json
from moac_runtime.package.spec import ModelSpec, RopeSpec
from moac_runtime.package.tensor_header import header_bytes, parse_header

_SCHEME = "moac model 2"
_CHUNK = 1 << 20
_FOLLOWS_FROM_THETA = ("default", "dynamic")  # RoPE kinds


def safetensors_identity(
    spec: ModelSpec, files: Mapping[str, Path], names: Collection[str]
) -> str:
    """The identity, 64 hex digits, of tensors in safetensors.

    `files`: each tensor's file; `names`: those that the model is made of. Raises CheckpointError
    for a file that cannot be read.
    """
    digests: dict[str, str] = {}
    for path in {files[name] for name in names}:
        digests |= _digests(_safetensors_digests, path)
    return _identity(spec, {name: digests[name] for name in names})


def gguf_identity(spec: ModelSpec, path: Path) -> str:
    """The identity of a GGUF file: its tensors as they are stored, blocks of a quantisation too.

    Raises CheckpointError for a file that cannot be read.
    """
    return _identity(spec, _digests(_gguf_digests, path))


def _identity(spec: ModelSpec, digests: Mapping[str, str]) -> str:
    told = json.dumps(_described(spec), sort_keys=True, separators=(",", ":"))
    lines = [_SCHEME, told, *(f"{name} {digests[name]}" for name in sorted(digests))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _described(spec: ModelSpec) -> dict[str, Any]:
    """The spec without what a library's or a processor's rounding may change.

    Options that are neutral are not told, so one that is added later changes no identity.
    """
    return spec.to_json() | {"ropes": [_rounded(rope) for rope in spec.ropes]}


def _rounded(rope: RopeSpec) -> dict[str, Any]:
    given = () if rope.kind in _FOLLOWS_FROM_THETA else rope.inv_freq
    rounded = {"inv_freq": [f"{f:.4g}" for f in given], "scaling": f"{rope.scaling:.6g}"}
    if rope.long_inv_freq:
        rounded["long_inv_freq"] = [f"{f:.4g}" for f in rope.long_inv_freq]
    return to_json(rope) | rounded


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as its file holds it: `size` bytes from `offset` on."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


def _digests(read: Any, path: Path) -> Mapping[str, str]:
    try:
        stat = path.stat()
        found: Mapping[str, str] = read(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}); check the disk and the file's "
            "permissions, or download it again"
        ) from None
    return found


# Kept per path, size, time of change and inode, so that weights are read for it once a process.
@cache
def _safetensors_digests(path: Path, size: int, modified: int, inode: int) -> Mapping[str, str]:
    with path.open("rb") as file:
        length = header_bytes(file.read(8))
        header = parse_header(file.read(length))
    return _hashed(
        path,
        (
            _Stored(name, t.stored, t.shape, 8 + length + t.first, t.stop - t.first)
            for name, t in header.items()
        ),
    )


@cache
def _gguf_digests(path: Path, size: int, modified: int, inode: int) -> Mapping[str, str]:
    from gguf import GGUFReader

    return _hashed(
        path,
        (
            _Stored(
                tensor.name,
                tensor.tensor_type.name,
                tuple(map(int, tensor.shape)),
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in GGUFReader(path).tensors
        ),
    )


def _hashed(path: Path, tensors: Iterable[_Stored]) -> dict[str, str]:
    found = list(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        sums = pool.map(lambda tensor: _sha256(path, tensor), found)
        return {
            t.name: f"{t.kind} {list(t.shape)} {digest}"
            for t, digest in zip(found, sums, strict=True)
        }


def _sha256(path: Path, tensor: _Stored) -> str:
    """Read in pieces: a mapped file would count as memory of this process."""
    digest, left = hashlib.sha256(), tensor.size
    with path.open("rb") as file:
        file.seek(tensor.offset)
        while left and (data := file.read(min(_CHUNK, left))):
            digest.update(data)
            left -= len(data)
    if left:
        raise CheckpointError(f"{path} ends within {tensor.name}; download it again")
    return digest.hexdigest()
