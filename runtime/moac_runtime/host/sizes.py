"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from moac_runtime.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([kmgt]?)(i?)b?")
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(size: str | int) -> int:
    """Bytes of `"2GB"` (powers of 1000), `"500MiB"` (of 1024) or a plain number such as `"1e9"`.

    Raises UsageError.
    """
    match = _SIZE.fullmatch(str(size).strip().lower())
    if not match or (match[3] and not match[2]):
        raise UsageError(f"{size!r} is not a size, expected one like 2GB, 500MiB or 1000000")
    count = int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2]])
    if count < 1:
        raise UsageError(f"{size!r} is no bytes at all, expected a size of at least one byte")
    return count
