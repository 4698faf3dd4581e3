"""What a work folder holds, and which of it to drop. Imports no torch.

Only what moac wrote is ever removed: files of the names it gives, of its own kinds. Everything
else in the folder is foreign; it is told and left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moac.store.atomic import PARTIAL, is_abandoned, remove_abandoned
from moac.store.kept import KERNELS, RESULTS, Damaged, Header, parse_name, read_folder, read_result
from moac_runtime.errors import MoacError
from moac_runtime.package.trust import trust_folder, trusted_digests

DAMAGED = "damaged"
PARTIALS = "partial"
IN_USE = "in use"
BUILT = "kernels"
TRUSTED = "trusted"
KINDS = (*RESULTS, BUILT, DAMAGED, PARTIALS, IN_USE)
"""Results, native kernels, what is damaged, what killed runs left, what is being written."""


@dataclass(frozen=True, slots=True)
class Item:
    """Something of ours in the folder. `size`: bytes; `used`: when last, in seconds since 1970.

    `header`: None where it is damaged or half-written.
    """

    path: Path
    kind: str
    size: int
    used: float
    header: Header | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """A work folder looked at: what is ours, and the names of what is not."""

    root: Path
    items: tuple[Item, ...]
    foreign: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Subtotal:
    """Items together. `oldest`, `newest`: seconds since they were last of use."""

    name: str
    model: str
    files: int
    size: int
    oldest: float
    newest: float

    @classmethod
    def of(cls, name: str, items: Sequence[Item], now: float, model: str = "") -> Subtotal:
        """The group of one item at least, as it is `now`."""
        ages = [max(0.0, now - item.used) for item in items]
        size = sum(item.size for item in items)
        return cls(name, model, len(items), size, max(ages), min(ages))

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def survey(root: Path) -> Contents:
    """Look at every entry of the work folder `root`, reading what it holds. Raises MoacError."""
    try:
        entries = sorted(root.iterdir()) if root.exists() else []
    except OSError as error:
        raise MoacError(
            f"the work folder {root} cannot be read ({error.strerror}); check its permissions"
        ) from error
    items: list[Item] = []
    foreign: list[str] = []
    for path in entries:
        try:
            item = _item(path)
        except FileNotFoundError:  # another process removed it
            continue
        if item is None:
            foreign.append(path.name)
        else:
            items.append(item)
    return Contents(root, tuple(items), tuple(foreign))


def trusted() -> list[Item]:
    """The records of packages whose code may run here, which are in no work folder."""
    folder = trust_folder()
    paths = [] if folder is None else [folder / digest for digest in trusted_digests()]
    return [Item(path, TRUSTED, _size(path), path.lstat().st_mtime) for path in paths]


def by_kind(items: Sequence[Item], now: float) -> list[Subtotal]:
    """What there is of every kind."""
    found = {kind: [item for item in items if item.kind == kind] for kind in KINDS}
    return [Subtotal.of(kind, some, now) for kind, some in found.items() if some]


def by_model(items: Sequence[Item], now: float) -> list[Subtotal]:
    """The results of every model, by the name that its checkpoint had last."""
    names: dict[str, str] = {}
    models: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: item.used):
        if item.header is not None and item.header.model:
            names[item.header.model] = item.header.source
            models.setdefault(item.header.model, []).append(item)
    return [Subtotal.of(names[model], some, now, model) for model, some in models.items()]


def choose(
    items: Iterable[Item],
    *,
    now: float,
    every: bool = False,
    damaged: bool = False,
    partial: bool = False,
    older_than: float | None = None,
) -> list[Item]:
    """The items that any of these names; `older_than`: seconds. Nothing that is being written."""

    kinds = {kind for kind, asked in ((DAMAGED, damaged), (PARTIALS, partial)) if asked}

    def named(item: Item) -> bool:
        old = older_than is not None and now - item.used > older_than
        return every or old or item.kind in kinds

    return [item for item in items if item.kind != IN_USE and named(item)]


def drop(items: Iterable[Item]) -> tuple[list[Item], list[tuple[Item, OSError]]]:
    """Remove them: those that are gone by this, and those that the system would not let go."""
    removed: list[Item] = []
    failed: list[tuple[Item, OSError]] = []
    for item in items:
        try:
            if _drop(item):
                removed.append(item)
        except FileNotFoundError:  # another process was first
            continue
        except OSError as error:
            failed.append((item, error))
    return removed, failed


def _drop(item: Item) -> bool:
    """Whether it was removed: a partial file may have been taken up since, a result made anew."""
    if item.kind == PARTIALS:
        return remove_abandoned(item.path)
    if item.kind == TRUSTED:
        item.path.unlink()
        return True
    if _item(item.path) != item:
        return False
    if item.path.is_dir():
        _drop_kernels(item.path)
    else:
        item.path.unlink()
    return True


def _drop_kernels(folder: Path) -> None:
    """Remove a build and its folder, which stays where it holds something else too."""
    for file in folder.iterdir():
        if file.suffix in (".so", ".json") and not file.is_dir():
            file.unlink(missing_ok=True)
    folder.rmdir()


def _item(path: Path) -> Item | None:
    """What `path` is, None where it is not ours. Raises FileNotFoundError."""
    stat = path.lstat()
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return None
    if path.name.startswith(PARTIAL):
        kind = PARTIALS if is_abandoned(path) else IN_USE
        return Item(path, kind, _size(path), stat.st_mtime)
    named = parse_name(path.name)
    if named is None or path.is_dir() != (named[0] == KERNELS):
        return None
    read: Callable[[Path], tuple[Header, Any]] = read_folder if path.is_dir() else read_result
    try:
        header, _ = read(path)
    except Damaged:
        return Item(path, DAMAGED, _size(path), stat.st_mtime)
    kind = BUILT if path.is_dir() else header.kind
    return Item(path, kind, _size(path), stat.st_mtime, header)


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
