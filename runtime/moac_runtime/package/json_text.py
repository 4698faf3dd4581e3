"""JSON from others, read strictly: nothing in it may mean two things, or more than can be held.

Python's own reader takes the last of two equal keys, NaN, halves of surrogate pairs and numbers
that are infinite once read. Other readers take other things, or fail on them much later.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moac_runtime.host.files import read_regular

MOST_BYTES = 16 * 2**20
"""Of one text: what it says takes at most some 40 times as much memory."""

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MOST_DEPTH = 64
_MOST_DIGITS = 40
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json_file(path: Path) -> Any:
    """What a JSON file says. Raises OSError, and ValueError, whose text is a phrase."""
    return parse_json(read_regular(path, MOST_BYTES))


def parse_json(data: str | bytes) -> Any:
    """What a JSON text says, of bytes in UTF-8, or in UTF-16 with its mark at the start.

    Raises ValueError, whose text is a phrase, for what is no JSON, for a key that stands twice in
    an object, a number that is not finite or has too many digits, half a surrogate pair, and for
    what is nested too deeply or too long.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
    text = data if isinstance(data, str) else _decoded(data)
    try:
        found = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
        _check_depth(found)
    except RecursionError:
        raise _too_deep() from None
    if _SURROGATE.search(text):
        _check_text(found)
    return found


def _decoded(data: bytes) -> str:
    encoding = "utf-16" if data.startswith(_UTF16) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        raise ValueError(
            f"byte {error.start + 1} (0x{data[error.start]:02x}) is not {kind}"
        ) from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r:.60} stands twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"the number {text:.20} is too large")
    return found


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"the number {text:.20}... has {len(text)} digits")
    return int(text)


def _check_depth(found: Any) -> None:
    """Readers of what is nested call themselves, each with frames of its own."""
    level = [found]
    for _ in range(_MOST_DEPTH + 1):
        level = [
            part for whole in level for part in _parts(whole) if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {_MOST_DEPTH} deep")


def _check_text(found: Any) -> None:
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            "a \\u escape is half of a surrogate pair, which is no character"
        ) from None
