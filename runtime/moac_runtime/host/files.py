"""Files from others: regular ones of a size that can be meant."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# A pipe would be waited for: opening it must not.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)


def read_regular(path: Path, most: int) -> bytes:
    """All of a regular file, which holds at most `most` bytes however long it grows meanwhile.

    Raises OSError, and ValueError, whose text is a phrase, for a pipe, a device or a longer file.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _AT_ONCE)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    return data
