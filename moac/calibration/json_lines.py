"""JSON Lines as people write them: one object a line, and a bad line is named."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moac_runtime.errors import UsageError

_ONE = "give one object a line"


def read_objects(path: Path, what: str) -> list[tuple[str, dict[str, Any]]]:
    """`(FILE line N, object)` of every line that is not blank; `what` names the file in errors.

    Lines end at a line feed alone, since JSON text may hold every other line separator. A
    carriage return before it and a byte order mark are no part of a line. Raises UsageError for a
    file that cannot be read and for a line that is not one JSON object in UTF-8.
    """
    return [(source, _object(line, source)) for source, line in _lines(path, what) if line.strip()]


def _lines(path: Path, what: str) -> Iterator[tuple[str, str]]:
    try:
        if path.exists() and not path.is_file():
            raise UsageError(
                f"the {what} file {path} is no regular file, and it is read more than once; "
                "give a file"
            )
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the {what} file {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
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
        data = json.loads(line, object_pairs_hook=_once, parse_constant=_refuse_constant)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except UnicodeEncodeError:
        raise UsageError(
            f"{source}: a \\u escape is half of a surrogate pair, which is no character; {_ONE}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source}: not valid JSON ({error}); {_ONE}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{source}: expected a JSON object, found {type(data).__name__}")
    return data


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.60} stands twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
