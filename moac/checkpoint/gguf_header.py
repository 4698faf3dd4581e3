"""Whether the header of a GGUF file stays within the file and within reason.

Asked before a library reads it, which takes counts and lengths at their word: past the end of a
file it goes on reading nothing, element by element.
"""

from __future__ import annotations

import math
from mmap import ACCESS_READ, mmap
from pathlib import Path

_STRING, _ARRAY = 8, 9
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# The library makes some objects of each of these; three lists of a large vocabulary and its
# merges are well below a million.
_MOST_VALUES = 1_500_000
_MOST_FIELDS = 65_536
_MOST_TENSORS = 65_536
_MOST_DIMS = 4  # as llama.cpp has it
_MOST_NUMBERS = 2**48  # of a tensor
_MOST_HEADER = 64 * 2**20


def check_header(path: Path) -> None:
    """Raises OSError, and ValueError, whose text is a phrase, for a header that is not whole."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        _Header(data).check()


class _Header:
    """A walk over the header from its first field on; `at` is where it stands."""

    def __init__(self, data: mmap) -> None:
        self._data, self._at, self._values = data, 8, 0

    def check(self) -> None:
        """Walk to its end. Raises ValueError."""
        tensors = self._count(_MOST_TENSORS, "tensors")
        for _ in range(self._count(_MOST_FIELDS, "fields")):
            self._text()
            self._value(self._number(4))
        for _ in range(tensors):
            self._tensor()

    def _value(self, kind: int) -> None:
        if kind != _ARRAY:
            return self._some(kind, 1)
        inner, count = self._number(4), self._number(8)
        self._values += count
        if self._values > _MOST_VALUES:
            raise ValueError(f"its lists have more than {_MOST_VALUES} values")
        self._some(inner, count)

    def _some(self, kind: int, count: int) -> None:
        if kind == _STRING:
            for _ in range(count):
                self._text()
        elif kind in _BYTES:
            self._skip(count * _BYTES[kind])
        else:
            raise ValueError(f"it holds a list in a list, or a value of the unknown kind {kind}")

    def _tensor(self) -> None:
        self._text()
        dims = self._count(_MOST_DIMS, "dimensions of a tensor", width=4)
        if math.prod(self._number(8) for _ in range(dims)) > _MOST_NUMBERS:
            raise ValueError("a tensor has more numbers than any file holds")
        self._skip(4)
        if self._number(8) > len(self._data):
            raise ValueError("a tensor begins past its end")

    def _text(self) -> None:
        self._skip(self._number(8))

    def _count(self, most: int, what: str, *, width: int = 8) -> int:
        found = self._number(width)
        if found > most:
            raise ValueError(f"it tells of {found} {what}, at most {most} are read")
        return found

    def _number(self, width: int) -> int:
        first = self._at
        self._skip(width)
        return int.from_bytes(self._data[first : self._at], "little")

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > min(len(self._data), _MOST_HEADER):
            raise ValueError("it ends, or has 64 MiB, within its header")
