"""The work folder: each stage's result under a key made of everything it depends on.

An interrupted compile goes on where it stopped, and another budget reuses the profile.
"""

from __future__ import annotations

import ctypes
import errno
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moac.store.atomic import sweep
from moac.store.kept import RESULTS, Damaged, Header, mark_used, read_result, write_result
from moac_runtime.errors import MoacError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Workspace:
    """Results as files `<root>/<kind>-<key>.<suffix>` (see `kept.py`).

    `source` and `model`: name and identity of the checkpoint whose results are written, which
    they tell to people.
    """

    root: Path
    source: str = ""
    model: str = ""

    def prepare(self) -> None:
        """Make the folder, and remove what killed runs left half-written. Raises MoacError."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.root, error) from error
        sweep(self.root)

    def load_json(self, kind: str, key: str) -> Any | None:
        """The stored value; None, with a line that says why, where it is damaged, or absent."""
        return self._load(kind, key)

    def save_json(self, kind: str, key: str, value: Any) -> None:
        """Store a JSON value. Raises MoacError."""
        self._save(kind, key, value)

    def load_tensors(self, kind: str, key: str) -> dict[str, Tensor] | None:
        """The stored tensors; None, with a line that says why, where damaged, or absent."""
        import torch

        arrays = self._load(kind, key)
        if arrays is None:
            return None
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def save_tensors(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors. Raises MoacError."""
        self._save(kind, key, {name: t.detach().cpu().numpy() for name, t in tensors.items()})

    def _path(self, kind: str, key: str) -> Path:
        return self.root / f"{kind}-{key}.{RESULTS[kind]}"

    def _load(self, kind: str, key: str) -> Any | None:
        path = self._path(kind, key)
        try:
            _, value = read_result(path)
        except FileNotFoundError:
            return None
        except Damaged as reason:
            told_damaged(path, reason)
            return None
        mark_used(path)
        return value

    def _save(self, kind: str, key: str, value: Any) -> None:
        path = self._path(kind, key)
        try:
            write_result(path, Header(kind, key, self.source, self.model), value)
        except IsADirectoryError:
            click.echo(
                f"note: {path} is a folder, so the result is not kept; move it away", err=True
            )
        except OSError as error:
            raise unwritable(self.root, error) from error


def told_damaged(path: Path, reason: Damaged) -> None:
    """Say on stderr that what is kept at `path` is made again, and why."""
    click.echo(f"note: {path} {reason}; it is made again", err=True)


def unwritable(folder: Path, error: OSError) -> MoacError:
    """What to tell where the work folder cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space (`moac clean` tells what is kept)" if full else "check the folder"
    return MoacError(
        f"cannot write to the work folder {folder}: {error.strerror}; {remedy}, or name another "
        "with --work-dir"
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
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
