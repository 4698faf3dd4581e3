"""A package's weights in memory for native code: mapped files, named addresses, no library."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moac_runtime.errors import ArtifactError
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.dtypes import DTYPES, STORED_BYTES
from moac_runtime.package.integrity import REMEDY
from moac_runtime.package.tensor_header import StoredTensor, header_bytes, parse_header
from moac_runtime.package.weights import (
    Entry,
    check_header,
    expected_tensors,
    missing_tensor,
    no_tensors,
    shards,
    stored_tensors,
)


@dataclass(frozen=True, slots=True)
class MappedWeights:
    """`addresses` of the weights by name, good for as long as `memory` is held."""

    addresses: Mapping[str, int]
    memory: tuple[mmap.mmap, ...]


def map_weights(artifact: Artifact, library: Any, dtype: str) -> MappedWeights:
    """Every weight of a package as `dtype`, float32 or bfloat16; of fewer bits as it lies.

    Files are mapped and not copied where they hold `dtype`; else what is converted is the only
    copy of it that stays. Raises ArtifactError as `weights.load_weights` does.
    """
    expected = stored_tensors(artifact)
    addresses: dict[str, int] = {}
    memory: list[mmap.mmap] = []
    for shard, names in shards(artifact, expected).items():
        mapped, places = _map_shard(artifact, shard, {name: expected[name] for name in names})
        memory.append(mapped)
        start = address_of(mapped)
        addresses |= {name: start + place for name, place in places.items()}
    found = MappedWeights(addresses, tuple(memory))
    return found if artifact.dtype == dtype else _converted(found, artifact, library, dtype)


def address_of(memory: mmap.mmap) -> int:
    """Where mapped memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _map_shard(
    artifact: Artifact, shard: str, expected: Mapping[str, Entry]
) -> tuple[mmap.mmap, dict[str, int]]:
    """A weights file in memory, and the offset of each tensor in it."""
    with artifact.path(shard).open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # which cannot be mapped
            raise no_tensors(shard, "it is empty")
        # a private mapping: nothing is copied unless somebody writes, and nobody does
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header, start = _header(mapped, shard)
    places: dict[str, int] = {}
    for name, entry in expected.items():
        found = header.get(name)
        if found is None:
            raise missing_tensor(shard, name)
        check_header(shard, name, entry, found.shape, found.stored)
        number = STORED_BYTES[entry.stored]
        size = math.prod(entry.shape) * number
        place = start + found.first
        if found.stop - found.first != size or start + found.stop > len(mapped) or place % number:
            raise ArtifactError(
                f"{name} in {shard} lies at {found.first} to {found.stop}, expected {size} bytes "
                f"inside the file, at a multiple of {number}: {REMEDY}"
            )
        places[name] = place
    return mapped, places


def _header(mapped: mmap.mmap, shard: str) -> tuple[dict[str, StoredTensor], int]:
    """What the safetensors header says of each tensor, and where the data begins."""
    try:
        length = header_bytes(mapped[:8])
        return parse_header(mapped[8 : 8 + length]), 8 + length
    except ValueError as error:
        raise no_tensors(shard, str(error)) from None


def _converted(
    found: MappedWeights, artifact: Artifact, library: Any, dtype: str
) -> MappedWeights:
    entries = stored_tensors(artifact)
    counts = {
        name: math.prod(shape)
        for name, shape in expected_tensors(artifact.spec).items()
        if entries[name].stored not in ("I8", "U8")
    }
    itemsize, stored_as = DTYPES[dtype].bytes, DTYPES[artifact.dtype].number
    memory = mmap.mmap(-1, sum(counts.values()) * itemsize)
    address, addresses = address_of(memory), {}
    for name, count in counts.items():
        addresses[name] = address
        library.moac_convert(found.addresses[name], stored_as, address, dtype == "bfloat16", count)
        address += count * itemsize
    if artifact.weights == "full":
        return MappedWeights(addresses, (memory,))
    return MappedWeights({**found.addresses, **addresses}, (*found.memory, memory))
