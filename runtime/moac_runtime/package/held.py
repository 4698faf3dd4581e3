"""A package's files, each opened once: what is checked is what is read, whatever names become.

The folder is opened, and every file through it. So a package that is exchanged for another one
under the same name, or a file of it, changes nothing for whoever holds it.
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import all_suffixes
from pathlib import Path

_CODE = tuple(all_suffixes())
_DESCRIPTORS = next(
    (Path(folder) for folder in ("/proc/self/fd", "/dev/fd") if os.path.isdir(folder)), None
)
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe in a file's place holds nobody up


class HeldFiles:
    """The files below a folder. `root`: its path, for messages.

    `hold` opens files that stay open as long as this object; any other is opened at each use.
    Raises OSError.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = os.open(root, _FLAGS | os.O_DIRECTORY)
        self._held: dict[str, int] = {}
        weakref.finalize(self, _close, self._folder, self._held)

    def hold(self, names: Iterable[str]) -> None:
        """Open the files of these names, relative to the folder, and keep them open."""
        for name in names:
            if name not in self._held:
                self._held[name] = self._open(name)

    def release(self, names: Iterable[str]) -> None:
        """Close files that nobody reads any more."""
        for name in names:
            os.close(self._held.pop(name))

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """A descriptor of the file, good inside the block; the held one where it is held."""
        if name in self._held:
            yield self._held[name]
            return
        descriptor = self._open(name)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, name: str, most: int | None = None) -> bytes:
        """The file as it is open, at most as many bytes as it has now, or `most` of them."""
        with self.opened(name) as descriptor:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "no regular file", str(self.root / name))
            left = found.st_size if most is None else min(found.st_size, most)
            parts = list[bytes]()
            while left > 0 and (part := os.pread(descriptor, left, sum(map(len, parts)))):
                parts.append(part)
                left -= len(part)
            return b"".join(parts)

    def path(self, name: str) -> Path:
        """A path of the held file itself, for what opens by path as long as this object is there.

        Raises KeyError for a file that is not held, OSError where the system has no such paths.
        """
        return descriptor_path(self._held[name])

    @property
    def folder(self) -> Path:
        """The same of the folder."""
        return descriptor_path(self._folder)

    def unchanged(self, name: str) -> bool:
        """Whether the file of this name in the folder is still the one that is held."""
        try:
            found = os.stat(name, dir_fd=self._folder)
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._held[name]))

    def replaced(self) -> bool:
        """Whether another folder, or nothing, stands under this one's path by now."""
        try:
            return not os.path.samestat(os.stat(self.root), os.fstat(self._folder))
        except OSError:
            return True

    def names(self) -> Iterator[str]:
        """Every file below the folder as a relative `a/b` name, sorted; byte-code caches too."""
        for folder, subfolders, names, _ in os.fwalk(dir_fd=self._folder):
            subfolders.sort()
            for name in sorted(names):
                yield Path(folder, name).as_posix()

    def linked_folders(self) -> Iterator[str]:
        """Every link to a folder below the folder, as a relative name: nobody looks into those."""
        for folder, subfolders, _, number in os.fwalk(dir_fd=self._folder):
            for name in sorted(subfolders):
                if stat.S_ISLNK(os.stat(name, dir_fd=number, follow_symlinks=False).st_mode):
                    yield Path(folder, name).as_posix()

    def _open(self, name: str) -> int:
        return os.open(name, _FLAGS, dir_fd=self._folder)


def descriptor_path(descriptor: int) -> Path:
    """A path of what a descriptor has open. Raises OSError where the system has no such paths."""
    if _DESCRIPTORS is None:
        raise FileNotFoundError("this system has neither /proc/self/fd nor /dev/fd")
    return _DESCRIPTORS / str(descriptor)


def is_code(name: str) -> bool:
    """Whether Python would import a file of this name."""
    return name.endswith(_CODE)


def _close(folder: int, held: dict[str, int]) -> None:
    for descriptor in (folder, *held.values()):
        os.close(descriptor)
