"""A folder written beside its target and moved there whole, or not at all.

Needs no torch: a compile refuses a bad target before it loads anything.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moac.store.atomic import partial_folder, sweep, sync, sync_tree
from moac.store.rename import exchange, move_new
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.package.integrity import MANIFEST


def check_target(target: Path, *, force: bool) -> None:
    """Refuse, before any work, a target that could not be written in the end.

    With `force` a moac package or an empty folder may stand there. Raises UsageError.
    """
    if "\0" in str(target):
        raise UsageError(f"{str(target)!r} holds a NUL, which no name does: choose another name")
    target = target.resolve()
    if target.exists():
        _check_existing(target, force=force)
    _check_parent(target)


@contextmanager
def staged(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A new folder beside `target`; it becomes `target` in one rename when the block ends well.

    When the block fails the folder is removed and `target` is what it was; what a killed process
    left is removed by the next one. Raises UsageError as `check_target`, MoacError where the disk
    is full or another process took the name.
    """
    check_target(target, force=force)
    target = target.resolve()
    with _explaining(target):
        prefix = f".{target.name}.staging-"
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, prefix)
        with partial_folder(target.parent, prefix) as staging:  # then of the package replaced
            yield staging
            _open_to_read(staging)
            sync_tree(staging)
            _publish(staging, target, force=force)


def _check_existing(target: Path, *, force: bool) -> None:
    if not target.is_dir():
        raise UsageError(f"{target} is a file, expected a folder to write: choose another name")
    if target.is_mount():
        raise UsageError(
            f"{target} is a mount point, which no rename can replace: choose a folder inside it"
        )
    if not force:
        raise UsageError(
            f"{target} already exists: pass --force to replace it, or choose another name"
        )
    if not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise UsageError(
            f"{target} is not a moac package (it holds no {MANIFEST}) and is not empty, and "
            "--force replaces packages alone: choose another name"
        )


def _check_parent(target: Path) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise UsageError(f"{parent} is a file, expected a folder: choose another name")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{parent} is not writable: choose another folder")


def _open_to_read(staging: Path) -> None:
    """Give every file ordinary permissions: safetensors writes for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for folder, _, names in os.walk(staging):
        for name in names:
            Path(folder, name).chmod(0o666 & ~mask)


def _publish(staging: Path, target: Path, *, force: bool) -> None:
    if target.exists():
        check_target(target, force=force)  # it may have appeared while we worked
        exchange(staging, target)
    else:
        move_new(staging, target)
    sync(target.parent)


@contextmanager
def _explaining(target: Path) -> Iterator[None]:
    """Turn the system's refusal to write here into a sentence; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MoacError(_disk_full(target)) from error
        if not Path(os.fsdecode(error.filename or "")).is_relative_to(target.parent):
            raise
        raise MoacError(
            f"{target} could not be written ({error.strerror}: {os.fsdecode(error.filename)}) "
            "and is as it was: check the folder's permissions or choose another"
        ) from error


def _disk_full(target: Path) -> str:
    free = shutil.disk_usage(next(path for path in target.parents if path.exists())).free
    return (
        f"the package does not fit on the disk of {target.parent} ({free / 1e6:.0f} MB free) and "
        f"{target} is as it was: free some space or choose a folder on another disk"
    )
