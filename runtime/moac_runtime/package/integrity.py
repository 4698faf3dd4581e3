"""Whether a package's files are the ones its manifest lists: place, size, SHA-256.

It finds damage and mix-ups. It does not protect against someone who rewrites files and manifest
together: run a package only from where you would run a program from.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import all_suffixes
from pathlib import Path, PurePosixPath, PureWindowsPath

from moac_runtime.errors import ArtifactError
from moac_runtime.host.cores import default_threads

MANIFEST = "moac.json"
REMEDY = "copy the package again or recompile it"

_CHUNK = 1 << 20
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as the manifest lists it: `size` in bytes, `sha256` in lower-case hex."""

    size: int
    sha256: str


class IntegrityCheck:
    """Checks names and sizes at once, then hashes in threads until `result` is asked for.

    Hashing releases the interpreter lock, so `import torch` can run beside it. Raises
    ArtifactError for a file that is missing, resized, outside the package or not listed.
    """

    def __init__(self, root: Path, files: Mapping[str, FileRecord], *, hashes: bool = True):
        for name, record in files.items():
            _check_size(name, _locate(root, name), record)
        _refuse_stray_code(root, files)
        self._files = files
        self._cancelled = threading.Event()
        self._digests = _start(root, files, self._cancelled) if hashes else {}

    def result(self) -> None:
        """Wait for the hashes. Raises ArtifactError naming the first file that was altered."""
        try:
            for name, digest in self._digests.items():
                _check_digest(name, digest, self._files[name])
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the hashing, whatever is done of it."""
        self._cancelled.set()


def hash_files(root: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and SHA-256 of each file below `root`. Raises OSError."""
    paths = {name: root / name for name in names}
    with ThreadPoolExecutor(_threads()) as pool:
        digests = pool.map(sha256, paths.values())
        return {
            name: FileRecord(path.stat().st_size, digest)
            for (name, path), digest in zip(paths.items(), digests, strict=True)
        }


def _threads() -> int:
    return min(_MOST_THREADS, default_threads())


def package_files(root: Path) -> Iterator[str]:
    """Every file below `root` as a relative `a/b` name, sorted; byte-code caches left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
        for name in sorted(names):
            yield Path(folder, name).relative_to(root).as_posix()


def sha256(path: Path, cancelled: threading.Event | None = None) -> str:
    """SHA-256 of a file in hex, read by chunks; cut short (and wrong) once `cancelled` is set."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(chunk)) and not (cancelled and cancelled.is_set()):
            digest.update(chunk[:count])
    return digest.hexdigest()


def inside(root: Path, name: str) -> Path:
    """The path of `name` below `root`, symlinks followed. Raises ArtifactError if it leaves it."""
    relative = PurePosixPath(name)
    odd = not name or relative.is_absolute() or PureWindowsPath(name).drive or "\0" in name
    if odd or "\\" in name or ".." in relative.parts or relative.as_posix() != name:
        raise ArtifactError(
            f"{MANIFEST} names the file {name!r}, expected a plain path inside the package: "
            "get the package from where you trust it"
        )
    path = _resolved(root / name)
    if not path.is_relative_to(root.resolve()):
        raise ArtifactError(
            f"{name} is a link to {path}, expected a file inside the package: "
            "copy the package with its links followed (cp -L)"
        )
    return path


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name no disk holds
        raise ArtifactError(f"{str(path)!r} cannot be followed ({error}): {REMEDY}") from error


def _locate(root: Path, name: str) -> Path:
    path = inside(root, name)
    if not os.path.exists(path):
        raise ArtifactError(
            f"{root / name} is missing, expected a file listed in {MANIFEST}: {REMEDY}"
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise ArtifactError(f"{root / name} is not a file, but {MANIFEST} lists it: {REMEDY}")
    return path


def _check_size(name: str, path: Path, record: FileRecord) -> None:
    found = path.stat().st_size
    if found != record.size:
        raise ArtifactError(
            f"{name} holds {found} bytes, expected {record.size} as {MANIFEST} lists it: {REMEDY}"
        )


def _refuse_stray_code(root: Path, files: Mapping[str, FileRecord]) -> None:
    """`python PACKAGE` imports from the package first, so an unlisted module there would run.

    Other unlisted files (a note, a `.DS_Store`) are read by nothing and do no harm.
    """
    for name in package_files(root):
        if name not in files and name.endswith(tuple(all_suffixes())):
            raise ArtifactError(
                f"{name} is code that {MANIFEST} does not list, expected only listed code in a "
                "package: remove the file"
            )


def _start(
    root: Path, files: Mapping[str, FileRecord], cancelled: threading.Event
) -> dict[str, Future[str]]:
    pool = ThreadPoolExecutor(_threads(), thread_name_prefix="moac-integrity")
    largest_first = sorted(files, key=lambda name: -files[name].size)
    digests = {name: pool.submit(sha256, root / name, cancelled) for name in largest_first}
    pool.shutdown(wait=False)
    return digests


def _check_digest(name: str, digest: Future[str], record: FileRecord) -> None:
    try:
        found = digest.result()
    except OSError as error:
        raise ArtifactError(
            f"{name} cannot be read ({error.strerror}), expected a readable file: "
            "check its permissions or copy the package again"
        ) from error
    if found != record.sha256:
        raise ArtifactError(
            f"{name} was altered: its SHA-256 is {found}, expected {record.sha256}: {REMEDY}"
        )
