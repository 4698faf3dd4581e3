"""JSON Lines as people write them: one object a line, and a bad line is named."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moac_runtime.errors import UsageError
from moac_runtime.host.files import read_regular
from moac_runtime.package.json_text import parse_json

_ONE = "give one object a line"
_MOST_BYTES = 64 * 2**20


def read_objects(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(FILE line N, object)` of every line that is not blank; `what` names the file in errors.

    Lines end at a line feed alone, since JSON text may hold every other line separator. A
    carriage return before it and a byte order mark are no part of a line. Raises UsageError for a
    file that cannot be read and for a line that is not one JSON object in UTF-8.
    """
    lines = ((source, line) for source, line in _lines(path, what) if line.strip())
    return ((source, _object(line, source)) for source, line in lines)


def _lines(path: Path, what: str) -> Iterator[tuple[str, str]]:
    try:
        if path.exists() and not path.is_file():
            raise UsageError(
                f"the {what} file {path} is no regular file, and it is read more than once; "
                "give a file"
            )
        data = read_regular(path, _MOST_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read the {what} file {path}: {error.strerror}") from error
    except ValueError as error:  # its length, or a NUL in the name
        raise UsageError(f"cannot read the {what} file {path}: {error}") from error
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        source = f"{path} line {number}"
        try:
            yield source, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{source}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; "
                "save the file as UTF-8"
            ) from error


def _object(line: str, source: str) -> dict[str, Any]:
    try:
        data = parse_json(line)
    except ValueError as error:
        raise UsageError(f"{source}: not valid JSON ({error}); {_ONE}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{source}: expected a JSON object, found {type(data).__name__}")
    return data
