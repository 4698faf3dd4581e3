"""What is kept between runs, as files: written whole or not at all, and proven before it is used.

A kept file tells what it is (kind, key, the model it is of) and carries a SHA-256 over that and
its contents, so a file that was cut short, altered or written by another version is found out.
This file imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moac.store.atomic import write_whole, writing_folder

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]

RESULTS = {"calibration": "json", "loss": "json", "profile": "safetensors", "eval": "json"}
"""Kinds of results and how their files end."""

KERNELS = "cpu"
"""The kind of a folder with native kernels."""

_KEY = "[0-9a-f]{20}"
_NAME = re.compile(
    "|".join(rf"({kind})-({_KEY})\.{suffix}" for kind, suffix in RESULTS.items())
    + rf"|({KERNELS})-({_KEY})"
)
_DIGESTS = "kept.json"
_OTHER_VERSION = "was written by another version, or not by moac"


@dataclass(frozen=True, slots=True)
class Header:
    """What a kept file says of itself. `model`: the identity of the checkpoint it is of, and
    `source` its name; both empty where it is of none.
    """

    kind: str
    key: str
    source: str = ""
    model: str = ""


class Damaged(Exception):
    """A kept file cannot be used; the message says why, as the end of a sentence about it."""


def parse_name(name: str) -> tuple[str, str] | None:
    """Kind and key of what moac keeps under `name`, None for any other name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    kind, key = (group for group in match.groups() if group is not None)
    return kind, key


def write_result(path: Path, header: Header, value: Any) -> None:
    """Keep `value` at `path`: JSON, or arrays by name for a `.safetensors`. Raises OSError."""
    pack = _pack_arrays if path.suffix == ".safetensors" else _pack_json
    write_whole(path, pack(header, value))


def read_result(path: Path) -> tuple[Header, Any]:
    """What `write_result` kept at `path`. Raises FileNotFoundError, Damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror})") from error
    if not data:
        raise Damaged("is empty")
    unpack = _unpack_arrays if path.suffix == ".safetensors" else _unpack_json
    header, value = unpack(data)
    _check_name(path, header)
    return header, value


def mark_used(path: Path) -> None:
    """Note when a kept file was last of use: its time of change tells, where it may be set."""
    with suppress(OSError):
        os.utime(path)


def write_folder(path: Path, header: Header, fill: Callable[[Path], object]) -> None:
    """Keep as the folder `path` the files that `fill(folder)` writes. Raises OSError."""
    with writing_folder(path) as folder:
        fill(folder)
        digests = {file.name: _sha256(file.read_bytes()) for file in folder.iterdir()}
        (folder / _DIGESTS).write_bytes(_pack_json(header, digests))


def read_folder(path: Path) -> tuple[Header, dict[str, bytes]]:
    """The files by name that `write_folder` kept at `path`. Raises FileNotFoundError, Damaged."""
    try:
        path.lstat()
        header, digests = _unpack_json((path / _DIGESTS).read_bytes())
        files = {name: (path / name).read_bytes() for name in digests}
    except FileNotFoundError as error:
        if error.filename == str(path):
            raise
        raise Damaged("is not whole") from None
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror})") from error
    for name, data in files.items():
        if _sha256(data) != digests[name]:
            raise Damaged(f"holds an altered {name}")
    _check_name(path, header)
    return header, files


def _pack_json(header: Header, value: Any) -> bytes:
    told = asdict(header)
    digest = _digest(told, _canonical(value))
    return json.dumps({"moac": told, "sha256": digest, "value": value}).encode()


def _unpack_json(data: bytes) -> tuple[Header, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Damaged("is cut short or altered: it is no JSON") from None
    if not isinstance(found, dict) or "value" not in found:
        raise Damaged(_OTHER_VERSION)
    value = found["value"]
    return _proven(found.get("moac"), found.get("sha256"), _canonical(value)), value


def _pack_arrays(header: Header, arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    ordered = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    told = asdict(header)
    digest = _digest(told, _contents(ordered))
    return save(ordered, {"moac": json.dumps(told), "sha256": digest})


def _unpack_arrays(data: bytes) -> tuple[Header, Arrays]:
    try:
        arrays: Arrays = load(data)
        length = int.from_bytes(data[:8], "little")
        told = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        header = json.loads(told.get("moac", "null"))
    except (SafetensorError, LookupError, ValueError, TypeError, RecursionError):
        raise Damaged("is cut short or altered: it is no safetensors file") from None
    return _proven(header, told.get("sha256"), _contents(arrays)), arrays


def _proven(told: Any, digest: Any, contents: bytes) -> Header:
    """The header, where the digest is that of header and contents. Raises Damaged."""
    if not isinstance(told, dict) or digest is None:
        raise Damaged(_OTHER_VERSION)
    if digest != _digest(told, contents):
        raise Damaged("was altered after it was written")
    try:
        return Header(**told)
    except TypeError:
        raise Damaged(_OTHER_VERSION) from None


def _digest(told: Mapping[str, Any], contents: bytes) -> str:
    return _sha256(_canonical(told) + b"\n" + contents)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _contents(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    parts = [
        f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes()
        for name, array in sorted(arrays.items())
    ]
    return b"".join(parts)


def _check_name(path: Path, header: Header) -> None:
    if (header.kind, header.key) != parse_name(path.name):
        raise Damaged(f"holds what was kept as {header.kind}-{header.key}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
