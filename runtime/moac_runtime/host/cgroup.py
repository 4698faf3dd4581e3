"""What the control groups of this process grant it (Linux, both versions of them).

A limit of any group above its own holds too, so the least of all counts. What is missing or makes
no sense limits nothing: the kernel writes these files, and a host without them sets no limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")  # of the file system; tests have one of their own

_NO_LIMIT = 1 << 60  # bytes: version 1 writes a number as large as it has for none


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that may be used, such as 1.5; None where nothing limits it."""
    found = (_quota(version, folder) for version, folder in _groups("cpu", root))
    return min((quota for quota in found if quota is not None), default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes of memory that may be used; None where nothing limits them."""
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    found = (_number(_read(folder / names[v]).strip()) for v, folder in _groups("memory", root))
    return min((size for size in found if size is not None and size < _NO_LIMIT), default=None)


def _quota(version: int, folder: Path) -> float | None:
    if version == 2:
        granted, _, period = _read(folder / "cpu.max").strip().partition(" ")
    else:
        granted, period = (
            _read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        )
    time, of = _number(granted), _number(period)
    return time / of if time and of else None


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of the process's own group with a controller, and of all above it."""
    mounts = list(_mounts(root))
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version == 2 or controller in controllers.split(","):
            fitting = [m for m in mounts if m.version == version and m.serves(controller)]
            for folder in _upwards(fitting, path):
                yield version, root / folder.lstrip("/")


@dataclass(frozen=True, slots=True)
class _Mount:
    """Where the groups from `top` on are seen as folders. `options`: names of controllers too."""

    version: int
    top: str
    folder: str
    options: frozenset[str]

    def serves(self, controller: str) -> bool:
        return self.version == 2 or controller in self.options


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        where, kind = before.split(), after.split()
        if len(where) > 4 and len(kind) > 2 and kind[0] in ("cgroup", "cgroup2"):
            version = 2 if kind[0] == "cgroup2" else 1
            top, folder = (_unescaped(name) for name in where[3:5])
            yield _Mount(version, top, folder, frozenset(kind[2].split(",")))


def _upwards(mounts: list[_Mount], path: str) -> Iterator[str]:
    """The folders of a group and of those above it, as far as a mount shows them.

    A container may see its own group as the top of a mount, under a name from outside.
    """
    inside = [mount for mount in mounts if _below(path, mount.top) is not None]
    for mount in inside or mounts[:1]:
        below = _below(path, mount.top) or PurePosixPath()
        for part in (below, *below.parents):
            yield str(PurePosixPath(mount.folder, part))


def _below(path: str, top: str) -> PurePosixPath | None:
    group = PurePosixPath(path)
    if ".." in group.parts or not group.is_relative_to(top):
        return None
    return group.relative_to(top)


def _unescaped(name: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """A positive whole number, None for any other text ("max", "-1")."""
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text) and int(text) else None
