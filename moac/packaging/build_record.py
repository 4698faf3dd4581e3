"""`build.json`: when, on what and in how long a package was made, told in no other file of it.

So the same inputs give the same bytes everywhere else. The manifest does not list it, nothing is
decided by it, and the runtime never reads it. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moac_runtime.errors import ArtifactError
from moac_runtime.host.files import read_regular
from moac_runtime.package.json_text import parse_json

BUILD = "build.json"

_MOST_BYTES = 1 << 16
_TEXTS = ("created", "processor")
_TABLES = ("seconds", "estimated_seconds", "peak_memory_by_stage")
_REMEDY = f"remove {BUILD}, which nothing needs"


def now() -> str:
    """The time to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_build(staging: Path, record: Mapping[str, Any]) -> None:
    """Write the record beside a finished manifest. Raises OSError."""
    text = json.dumps(dict(record), sort_keys=True, indent=2, allow_nan=False)
    (staging / BUILD).write_text(f"{text}\n", encoding="utf-8")


def read_build(package: Path) -> dict[str, Any] | None:
    """What `write_build` wrote, None where there is no such file.

    No hash proves it, so every field is checked. Raises ArtifactError for a file that is anything
    else.
    """
    path = package / BUILD
    if path.is_symlink():
        raise ArtifactError(f"{path} is not what moac wrote: {_REMEDY}")
    try:
        data = parse_json(read_regular(path, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): {_REMEDY}") from error
    except ValueError:
        raise ArtifactError(f"{path} is not what moac wrote: {_REMEDY}") from None
    if not _is_record(data):
        raise ArtifactError(f"{path} is not what moac wrote: {_REMEDY}")
    return dict(data)


def _is_record(data: Any) -> bool:
    return (
        isinstance(data, dict)
        and all(isinstance(data.get(name), str) and data[name].isprintable() for name in _TEXTS)
        and all(_is_table(data.get(name)) for name in _TABLES)
        and all(type(data.get(name)) is int for name in ("threads", "peak_memory_bytes"))
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name.isprintable() and type(number) in (int, float) for name, number in value.items()
    )
