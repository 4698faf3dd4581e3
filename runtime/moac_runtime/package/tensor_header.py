"""The header of a safetensors file: 8 bytes of its length, then JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moac_runtime.package.json_text import MOST_BYTES, parse_json


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a header says of one tensor; `first` and `stop` are bytes from the header's end on."""

    shape: tuple[int, ...]
    stored: str
    first: int
    stop: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. Raises OSError, and ValueError with a phrase."""
    with path.open("rb") as file:
        return parse_header(file.read(header_bytes(file.read(8))))


def header_bytes(start: bytes) -> int:
    """The length of the JSON, from a file's first 8 bytes. Raises ValueError with a phrase."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= MOST_BYTES:
        raise ValueError(f"its header has {length} bytes, at most {MOST_BYTES} are read")
    return length


def parse_header(data: bytes) -> dict[str, StoredTensor]:
    """The tensors by name. Raises ValueError with a phrase."""
    header = parse_json(data)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return {name: _tensor(name, told) for name, told in header.items() if name != "__metadata__"}


def _tensor(name: str, told: Any) -> StoredTensor:
    if not isinstance(told, dict):
        raise ValueError(f"its header tells nothing of {name!r:.60}")
    shape, stored = _sizes(told.get("shape")), told.get("dtype")
    offsets = _sizes(told.get("data_offsets"))
    if shape is None or not isinstance(stored, str) or offsets is None or len(offsets) != 2:
        raise ValueError(f"its header tells no shape, dtype and data_offsets of {name!r:.60}")
    return StoredTensor(shape, stored, *offsets)


def _sizes(found: Any) -> tuple[int, ...] | None:
    right = isinstance(found, list) and all(type(one) is int and one >= 0 for one in found)
    return tuple(found) if right else None
