"""Whether a package's files are the ones its manifest lists: place, size, SHA-256.

It finds damage and mix-ups. Somebody who rewrites files and manifest together is found by a
signature (`signature.py`), and runs no code where the package is not trusted (`trust.py`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from moac_runtime.errors import ArtifactError
from moac_runtime.host.cores import default_threads
from moac_runtime.package.held import HeldFiles, is_code

MANIFEST = "moac.json"
REMEDY = "copy the package again or recompile it"

CODE = ("kernels/", "moac_runtime/", "__main__.py")
"""How the names of files begin that are there to be executed."""

_OWN_RUNTIME = ("moac_runtime/", "__main__.py")  # read by `python PACKAGE` alone
_CHUNK = 1 << 20
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as the manifest lists it: `size` in bytes, `sha256` in lower-case hex."""

    size: int
    sha256: str


class IntegrityCheck:
    """Checks names and sizes at once, then hashes in threads until `result` is asked for.

    Hashing releases the interpreter lock, so `import torch` can run beside it. `hashed`: which
    files are hashed, by how their names begin; "" is all of them. From here on every file is held
    open; once all is well, all but those of the runtime that a package carries. Raises
    ArtifactError for a file that is missing, resized, outside the package or not listed.
    """

    def __init__(
        self, held: HeldFiles, files: Mapping[str, FileRecord], *, hashed: tuple[str, ...] = ("",)
    ):
        for name, record in files.items():
            _locate(held.root, name)
            with _explaining(held.root, name):
                held.hold([name])
                with held.opened(name) as descriptor:
                    _check_size(held.root, name, os.fstat(descriptor), record)
        _refuse_stray_code(held, files)
        self._held, self._files = held, files
        self._cancelled = threading.Event()
        named = {name: files[name] for name in files if name.startswith(hashed)}
        self._digests = _start(held, named, self._cancelled)

    def result(self) -> None:
        """Wait for the hashes. Raises ArtifactError naming the first file that was altered."""
        try:
            for name, digest in self._digests.items():
                _check_digest(name, digest, self._files[name])
        finally:
            self.cancel()
        self._held.release(name for name in self._files if name.startswith(_OWN_RUNTIME))

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


def sha256(file: Path | int, cancelled: threading.Event | None = None) -> str:
    """SHA-256 of a file in hex, read by chunks; cut short (and wrong) once `cancelled` is set.

    `file`: a path, or a descriptor, which is left open.
    """
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with open(file, "rb", buffering=0, closefd=isinstance(file, Path)) as opened:
        opened.seek(0)
        while (count := opened.readinto(chunk)) and not (cancelled and cancelled.is_set()):
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


def _locate(root: Path, name: str) -> None:
    """Refuse a name, or a link under it, that leads anywhere else than to a file below `root`."""
    path = inside(root, name)
    if not os.path.exists(path):
        raise _missing(root, name)
    if not stat.S_ISREG(path.stat().st_mode):
        raise _no_file(root, name)


@contextmanager
def _explaining(root: Path, name: str) -> Iterator[None]:
    """Turn the system's refusal to open a listed file into a sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise _missing(root, name) from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise unreadable(name, error) from error


def _missing(root: Path, name: str) -> ArtifactError:
    return ArtifactError(
        f"{root / name} is missing, expected a file listed in {MANIFEST}: {REMEDY}"
    )


def _no_file(root: Path, name: str) -> ArtifactError:
    return ArtifactError(f"{root / name} is not a file, but {MANIFEST} lists it: {REMEDY}")


def unreadable(name: str | Path, error: OSError) -> ArtifactError:
    """What is said of a file of a package that cannot be read."""
    return ArtifactError(
        f"{name} cannot be read ({error.strerror}), expected a readable file: "
        "check its permissions or copy the package again"
    )


def _check_size(root: Path, name: str, found: os.stat_result, record: FileRecord) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _no_file(root, name)
    if found.st_size != record.size:
        raise ArtifactError(
            f"{name} holds {found.st_size} bytes, expected {record.size} as {MANIFEST} lists it: "
            f"{REMEDY}"
        )


def _refuse_stray_code(held: HeldFiles, files: Mapping[str, FileRecord]) -> None:
    """`python PACKAGE` imports from the package first, so an unlisted module there would run.

    Other unlisted files (a note, a `.DS_Store`) are read by nothing and do no harm.
    """
    for name in held.names():
        if name not in files and is_code(name) and "__pycache__" not in Path(name).parts:
            raise ArtifactError(
                f"{name} is code that {MANIFEST} does not list, expected only listed code in a "
                "package: remove the file"
            )
    for link in held.linked_folders():
        if not any(name.startswith(f"{link}/") for name in files):
            raise ArtifactError(
                f"{link} is a link to a folder of which {MANIFEST} lists nothing, expected only "
                "listed code in a package: remove the link"
            )


def _start(
    held: HeldFiles, files: Mapping[str, FileRecord], cancelled: threading.Event
) -> dict[str, Future[str]]:
    def digest(name: str) -> str:
        with held.opened(name) as descriptor:
            return sha256(descriptor, cancelled)

    pool = ThreadPoolExecutor(_threads(), thread_name_prefix="moac-integrity")
    largest_first = sorted(files, key=lambda name: -files[name].size)
    digests = {name: pool.submit(digest, name) for name in largest_first}
    pool.shutdown(wait=False)
    return digests


def _check_digest(name: str, digest: Future[str], record: FileRecord) -> None:
    try:
        found = digest.result()
    except OSError as error:
        raise unreadable(name, error) from error
    if found != record.sha256:
        raise ArtifactError(
            f"{name} was altered: its SHA-256 is {found}, expected {record.sha256}: {REMEDY}"
        )
