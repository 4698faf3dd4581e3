"""Files and folders that appear whole or not at all, and are on the disk before they are named.

What is being written bears a temporary name and a lock; the system drops the lock with its
process, so what a killed one left is told from what another is writing. Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moac.store.rename import ASIDE, exchange

PARTIAL = ".partial-"
"""How the name of something begins that is being written, or was when its process died."""


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to the file `path`, replacing what stands there. Raises OSError."""
    with _partial(path.parent, _new_file) as (partial, file_number):
        with os.fdopen(file_number, "wb", closefd=False) as file:
            file.write(data)
            file.flush()
            os.fsync(file_number)
        partial.replace(path)
        sync(path.parent)


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends well, replacing what stands there.

    Raises OSError.
    """
    with partial_folder(path.parent) as partial:
        yield partial
        sync_tree(partial)
        try:
            partial.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            exchange(partial, path)  # what stood there is removed under the partial's name
        sync(path.parent)


@contextmanager
def partial_folder(parent: Path, prefix: str = PARTIAL) -> Iterator[Path]:
    """A locked new folder in `parent`, gone in the end unless it was renamed. Raises OSError."""
    with _partial(parent, _new_folder, prefix) as (partial, _):
        yield partial


def sync_tree(folder: Path) -> None:
    """Have every byte and name below `folder` on the disk. Raises OSError."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with everything in it. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def is_abandoned(path: Path) -> bool:
    """Whether what bears a temporary name has no process any more that writes it.

    False where nobody can tell, as on a file system without locks.
    """
    with _lock_of_nobody(path) as found:
        return found


def remove_abandoned(path: Path) -> bool:
    """Remove `path` if it is abandoned, and tell whether it was. Raises OSError."""
    with _lock_of_nobody(path) as found:
        if found:
            remove(path)
        return found


def sweep(folder: Path, prefix: str = PARTIAL) -> None:
    """Remove what killed processes left half-written in `folder`, as far as it can be removed.

    What `exchange` moved aside stays, since it may be all that is left of what it was.
    """
    with suppress(OSError):  # a folder that nobody may list
        for path in list(folder.iterdir()):
            if path.name.startswith(prefix) and not path.name.endswith(ASIDE):
                with suppress(OSError):
                    remove_abandoned(path)


@contextmanager
def _lock_of_nobody(path: Path) -> Iterator[bool]:
    """Hold the lock of `path`, whose writer finds out when it locks; False where it is held."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(lock)


@contextmanager
def _partial(
    folder: Path, create: Callable[[Path], int], prefix: str = PARTIAL
) -> Iterator[tuple[Path, int]]:
    """A locked file or folder of a temporary name, gone in the end unless it was renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    path, lock = _create(folder, create, prefix)
    try:
        yield path, lock
    finally:
        with suppress(OSError):
            remove(path)
        os.close(lock)


def _create(folder: Path, create: Callable[[Path], int], prefix: str) -> tuple[Path, int]:
    path = folder / f"{prefix}{secrets.token_hex(8)}"
    lock = create(path)
    with suppress(OSError):  # without locks here, no other process can tell, and none removes it
        fcntl.flock(lock, fcntl.LOCK_EX)
    if path.exists():
        return path, lock
    os.close(lock)  # another process took it for abandoned before it was locked
    return _create(folder, create, prefix)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)
