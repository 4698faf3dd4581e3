"""The metadata of a GGUF file, each field of the type that the format gives it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moac_runtime.errors import CheckpointError

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Fields:
    """Field name to value, arrays as lists. Every getter raises CheckpointError for a wrong type.

    Without a `default` a field must be there.
    """

    path: Path
    values: Mapping[str, Any]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def whole(self, name: str, default: Any = _ABSENT) -> Any:
        """A whole number."""
        return self._get(name, int, "a whole number", default)

    def number(self, name: str, default: Any = _ABSENT) -> Any:
        """A number."""
        return self._get(name, (int, float), "a number", default)

    def flag(self, name: str, default: Any = _ABSENT) -> Any:
        """True or false."""
        return self._get(name, bool, "true or false", default)

    def text(self, name: str, default: Any = _ABSENT) -> Any:
        """Text."""
        return self._get(name, str, "text", default)

    def texts(self, name: str, default: Any = _ABSENT) -> Any:
        """A list of texts."""
        return self._list(name, str, "a list of texts", default)

    def numbers(self, name: str, default: Any = _ABSENT) -> Any:
        """A list of numbers."""
        return self._list(name, (int, float), "a list of numbers", default)

    def _get(self, name: str, kind: Any, expected: str, default: Any) -> Any:
        value = self.values.get(name, default)
        if value is _ABSENT:
            raise CheckpointError(
                f"{self.path} lacks the field {name}; convert the original checkpoint again"
            )
        right = value is default or isinstance(value, kind)
        if not right or (isinstance(value, bool) and kind is not bool) or not _finite([value]):
            raise self.wrong(name, expected)
        return value

    def _list(self, name: str, kind: Any, expected: str, default: Any) -> Any:
        values = self._get(name, list, expected, default)
        right = values is default or all(isinstance(value, kind) for value in values)
        if not right or not _finite(values or []):
            raise self.wrong(name, expected)
        return values

    def wrong(self, name: str, expected: str) -> CheckpointError:
        """The sentence for a field that holds something else than `expected`."""
        return CheckpointError(
            f"{self.path} holds {name} = {self.values[name]!r:.60} where {expected} was expected; "
            "convert the original checkpoint again"
        )


def _finite(values: Iterable[Any]) -> bool:
    return all(math.isfinite(value) for value in values if isinstance(value, float))
