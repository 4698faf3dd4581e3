"""Moving a finished folder to its name in one step, over another folder or over nothing."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

ASIDE = ".replaced"
"""How the name of a folder ends that a process killed between two renames moved away."""

# linux/fcntl.h and linux/fs.h
_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2

# A system, C library or file system without renameat2, or without this flag.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def move_new(source: Path, target: Path) -> None:
    """Rename `source` to `target`. Raises FileExistsError where `target` exists, OSError."""
    if _renameat2(source, target, _NOREPLACE):
        return
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def exchange(source: Path, target: Path) -> None:
    """Swap two folders: `target` is never absent, and `source` then holds what it was.

    Where the system has no such call, `target` is moved away first and back on failure: a process
    killed between the two renames leaves the old folder as `{source}.replaced`. Raises OSError.
    """
    if _renameat2(source, target, _EXCHANGE):
        return
    aside = source.with_name(f"{source.name}{ASIDE}")
    target.rename(aside)
    try:
        source.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    aside.rename(source)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Linux's renameat2; False where there is no such thing. Raises OSError."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if not call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag):
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
