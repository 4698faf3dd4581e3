"""Whose packages may run their own code here: the digests that this user trusts, a file each.

A compile records what it makes, `moac trust` what it is told to. A digest names a package whole,
since a manifest holds the SHA-256 of every file, so a copy is trusted and an altered one is not.
The folder counts only while nobody else may write to it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from moac_runtime.errors import MoacError

_WITHOUT_CODE = ("torch", "onnx")
"""Targets whose files are data alone: weights, and a graph."""

UNTRUSTED = "this package was not compiled by this user on this host, so none of its code runs"
TRUST_IT = "if you trust whoever made it, give --trust, or run: moac trust PACKAGE"

_DIGEST = re.compile("[0-9a-f]{64}")


def harmless_targets(targets: Sequence[str]) -> tuple[str, ...]:
    """What runs a package of these targets without any code of its own.

    Its weights are those of torch, whatever else it is built for, unless it is a graph alone.
    """
    if set(targets) == {"onnx"}:
        return ("onnx",)
    return tuple(name for name in _WITHOUT_CODE if name == "torch" or name in targets)


def trust_folder() -> Path | None:
    """Where this user's trusted digests are: `$XDG_STATE_HOME/moac/trusted`, else in `~/.local`.

    It is no cache: who removes it has only to say again what is trusted. None where the system
    tells no home folder.
    """
    stated = os.environ.get("XDG_STATE_HOME")
    try:
        return Path(stated or "~/.local/state", "moac", "trusted").expanduser()
    except RuntimeError:
        return None


def is_trusted(digest: str) -> bool:
    """Whether this user recorded the package of this digest as one whose code may run."""
    folder = trust_folder()
    if folder is None or not _DIGEST.fullmatch(digest):
        return False
    return _is_own(folder, stat.S_ISDIR) and _is_own(folder / digest, stat.S_ISREG)


def trusted_digests() -> list[str]:
    """Every digest recorded, sorted; whether or not the folder's permissions let it count."""
    folder = trust_folder()
    if folder is None or not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if _DIGEST.fullmatch(path.name))


def trust(digest: str, note: str) -> None:
    """Record a package as trusted; `note`: what it is, for people. Raises MoacError.

    Raises MoacError too where what stands there is another user's, or others may write to it.
    """
    folder = trust_folder()
    if folder is None:
        raise MoacError(
            "this user has no home folder to record trusted packages in; set XDG_STATE_HOME to a "
            "folder"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(folder, stat.S_ISDIR):
            raise MoacError(
                f"others may write to {folder}, so what it says is not trusted; "
                f"make it yours alone (chmod 700 {folder})"
            )
        with suppress(FileExistsError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(folder / digest, flags, 0o600), "w", encoding="utf-8") as file:
                file.write(f"{note}\n")
    except OSError as error:
        raise MoacError(
            f"{folder} cannot be written ({error.strerror}); check its permissions"
        ) from error


def distrust(digest: str) -> bool:
    """Forget a trusted package; False where it was not recorded. Raises OSError."""
    folder = trust_folder()
    if folder is None or not _DIGEST.fullmatch(digest):
        return False
    try:
        (folder / digest).unlink()
    except FileNotFoundError:
        return False
    return True


def _is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether `path` is of this kind, this user's, and nobody else may write to it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    alone = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return alone and is_kind(found.st_mode)
