"""The work folder: each stage's result under a key made of everything it depends on.

An interrupted compile goes on where it stopped, and another budget reuses the profile.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moac.work_dir import default_work_dir as default_work_dir
from moac_runtime.errors import MoacError


def key(**parts: Any) -> str:
    """A short name for everything a result depends on (JSON values)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@cache
def code_digest(package: str) -> str:
    """SHA-256 over a package's sources: a result also depends on the code that made it."""
    sources = sorted(Path(str(files(package))).rglob("*.py"))
    if not sources:
        raise ValueError(f"{package} must be a package with sources, found none")
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Workspace:
    """Results as files `<root>/<kind>-<key>`, each written whole or not at all."""

    root: Path

    def load_json(self, kind: str, key: str) -> Any | None:
        """The stored value, or None."""
        path = self._path(kind, key, "json")
        return json.loads(path.read_text()) if path.exists() else None

    def save_json(self, kind: str, key: str, value: Any) -> None:
        """Store a JSON value."""
        self._write(self._path(kind, key, "json"), json.dumps(value).encode())

    def load_tensors(self, kind: str, key: str) -> dict[str, Tensor] | None:
        """The stored tensors, or None."""
        path = self._path(kind, key, "safetensors")
        return load_file(path) if path.exists() else None

    def save_tensors(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors."""
        path = self._path(kind, key, "safetensors")
        with self._replacing(path) as staging:
            save_file(
                {name: t.contiguous().to("cpu") for name, t in tensors.items()}, staging.path
            )

    def _path(self, kind: str, key: str, suffix: str) -> Path:
        return self.root / f"{kind}-{key}.{suffix}"

    def _write(self, path: Path, data: bytes) -> None:
        with self._replacing(path) as staging:
            staging.path.write_bytes(data)

    def _replacing(self, path: Path) -> _Replacing:
        return _Replacing(path)


class _Replacing:
    """A temporary file beside `target` that takes its name when all went well."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> _Replacing:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.target.parent, prefix=".partial-")
        except OSError as error:
            raise unwritable(self.target.parent, error) from error
        os.close(handle)
        self.path = Path(name)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.path.replace(self.target)
            return
        self.path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise MoacError(
                f"cannot write to the work folder {self.target.parent}: {error.strerror}; "
                "free some space or name another with --work-dir"
            ) from error


def unwritable(folder: Path, error: OSError) -> MoacError:
    """What to tell where nothing can be written to the work folder."""
    return MoacError(
        f"cannot write to the work folder {folder}: {error.strerror}; name another with --work-dir"
    )


def peak_memory_bytes() -> int:
    """The most memory this process has held resident, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Give memory that was freed back to the system: glibc keeps it, in pieces, for later."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
