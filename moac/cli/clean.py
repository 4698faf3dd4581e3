"""`moac clean`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moac_runtime.errors import MoacError, UsageError

if TYPE_CHECKING:
    from moac.store.cleaning import Contents, Item, Subtotal

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_TOLD = 5  # names of foreign files


def _age(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """`30d` in seconds."""
    if value is None:
        return None
    match = _AGE.fullmatch(value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is not an age such as 30d, 12h, 90m or 2w")
    return float(match[1]) * _SECONDS[match[2]]


@click.command("clean")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="the work folder  [$MOAC_CACHE or ~/.cache/moac]",
)
@click.option(
    "--older-than",
    callback=_age,
    metavar="AGE",
    help="remove what was not used for so long, as 30d, 12h, 90m or 2w",
)
@click.option(
    "--damaged", is_flag=True, help="remove what is cut short, altered or of another version"
)
@click.option("--partial", is_flag=True, help="remove what killed runs left half-written")
@click.option("--all", "every", is_flag=True, help="remove everything that moac keeps there")
@click.option(
    "--trust", is_flag=True, help="forget which packages you compiled or trusted (moac trust)"
)
@click.option("--dry-run", is_flag=True, help="tell what would be removed, and remove nothing")
@click.option("--yes", is_flag=True, help="do not ask before removing")
@click.option("--json", "as_json", is_flag=True, help="the same as JSON")
def clean_command(
    work_dir: Path | None, trust: bool, dry_run: bool, yes: bool, as_json: bool, **asked: Any
) -> None:
    """Show what compiles keep in the work folder, and remove what the options name.

    Without one nothing is removed. Several add up. Files that are not moac's are told and stay,
    and so does what another process is writing; a compile makes anew what is missing. Which
    packages are trusted is kept elsewhere, and goes by --trust alone.
    """
    from moac.store.cleaning import choose, drop, survey, trusted

    some = trust or any(value is not None and value is not False for value in asked.values())
    if yes and (dry_run or not some):
        reason = "--dry-run removes nothing" if dry_run else "nothing is named to be removed"
        raise UsageError(f"{reason}, so --yes has no meaning; leave it out or name what to remove")
    contents, now = survey(_root(work_dir)), time.time()
    records = trusted()
    chosen = [*choose(contents.items, now=now, **asked), *(records if trust else ())]
    if not as_json:
        click.echo(_table(contents, records, now))
    removed: list[Item] = []
    failed: list[tuple[Item, OSError]] = []
    if chosen and not dry_run and _confirmed(chosen, yes=yes):
        removed, failed = drop(chosen)
    if as_json:
        click.echo(json.dumps(_json(contents, records, chosen, removed, now), indent=2))
    elif some:
        did, which = ("would remove", chosen) if dry_run else ("removed", removed)
        click.echo(f"\n{did} {_amount(which)}")
    if failed:
        item, error = failed[0]
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise MoacError(
            f"{item.path}{more} could not be removed ({error.strerror}); check the permissions"
        )


def _root(work_dir: Path | None) -> Path:
    from moac.store.work_dir import default_work_dir

    root = default_work_dir() if work_dir is None else work_dir
    if work_dir is not None and not root.exists():
        raise UsageError(f"there is no folder {root}; name the work folder with --work-dir")
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file; name the work folder with --work-dir")
    return root


def _confirmed(chosen: Sequence[Item], *, yes: bool) -> bool:
    """Whether to go on: asked on a terminal. Raises UsageError elsewhere."""
    if yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            f"{_amount(chosen)} would be removed and nobody can be asked here; give --yes to "
            "remove them, or --dry-run"
        )
    return click.confirm(f"remove {_amount(chosen)}?", err=True)


def _amount(items: Sequence[Item]) -> str:
    count = "1 file" if len(items) == 1 else f"{len(items)} files"
    return f"{count}, {_size(sum(item.size for item in items))}"


def _table(contents: Contents, records: Sequence[Item], now: float) -> str:
    from moac.show.summary import table
    from moac.store.cleaning import by_kind, by_model

    parts = [f"work folder {contents.root}"]
    kinds = by_kind(contents.items, now)
    if kinds:
        columns = ("files", "size", "oldest", "newest")
        parts.append(table(("kept", *columns), [_row(group.name, group) for group in kinds]))
    if models := by_model(contents.items, now):
        rows = [_row(f"{group.name} {group.model[:16]}", group) for group in models]
        parts.append(table(("of the model", *columns), rows))
    if not kinds:
        parts.append("nothing is kept there")
    if records:
        parts.append(f"trusted packages: {len(records)}, recorded in {records[0].path.parent}")
    if contents.foreign:
        parts.append(_foreign(contents.foreign))
    return "\n\n".join(parts)


def _foreign(names: Sequence[str]) -> str:
    told = ", ".join(names[:_TOLD]) + (", ..." if len(names) > _TOLD else "")
    return f"not moac's, and left alone: {told}"


def _row(name: str, group: Subtotal) -> tuple[object, ...]:
    return (name, group.files, _size(group.size), _told_age(group.oldest), _told_age(group.newest))


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _told_age(seconds: float) -> str:
    unit = next((u for u in ("d", "h", "m") if seconds >= _SECONDS[u]), "s")
    return f"{seconds / _SECONDS[unit]:.0f} {unit}"


def _json(
    contents: Contents,
    records: Sequence[Item],
    chosen: Sequence[Item],
    removed: Sequence[Item],
    now: float,
) -> dict[str, Any]:
    """Sizes in bytes, ages in seconds."""
    from moac.store.cleaning import by_kind, by_model

    return {
        "work_dir": str(contents.root),
        "kept": [group.to_json() for group in by_kind(contents.items, now)],
        "models": [group.to_json() for group in by_model(contents.items, now)],
        "trusted": [item.path.name for item in records],
        "foreign": list(contents.foreign),
        "chosen": [item.path.name for item in chosen],
        "removed": [item.path.name for item in removed],
    }
