"""Dataclasses as JSON. A field at its neutral value, which is its default, is left out.

So a field that a later version adds with a neutral value changes nothing that was written before
it, neither how it reads nor a digest over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_json(record: Any) -> dict[str, Any]:
    """A dictionary of JSON values, inverse of `from_json`."""
    values = ((field, getattr(record, field.name)) for field in fields(record))
    return {field.name: _plain(value) for field, value in values if value != field.default}


def from_json(kind: type[T], data: Mapping[str, Any]) -> T:
    """The record of `kind`. Raises KeyError or TypeError where a field is missing or unknown."""
    hints = get_type_hints(kind)
    if unknown := sorted(data.keys() - hints.keys()):
        raise TypeError(f"{kind.__name__} has no field {unknown[0]!r}")
    asked: Any = kind
    given = [f.name for f in fields(asked) if f.name in data or not has_neutral(f)]
    return kind(**{name: _typed(hints[name], data[name]) for name in given})


def has_neutral(field: Field[Any]) -> bool:
    """Whether a field has a neutral value, which it holds where it is left out."""
    return field.default is not MISSING


def record_in(hint: Any) -> type | None:
    """The dataclass that a type hint names, itself, as the items of a tuple, or as what may be
    None; None for others."""
    inner = get_args(hint) if get_origin(hint) in (tuple, UnionType) else (hint,)
    return next((one for one in inner if isinstance(one, type) and is_dataclass(one)), None)


def records_in(hint: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Each record of a JSON value whose hint has one, and what to put after the field's name."""
    if get_origin(hint) is tuple:
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif value is not None:
        yield "", value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_json(value) if is_dataclass(value) else value


def _typed(hint: Any, value: Any) -> Any:
    kind = record_in(hint)
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return tuple(_typed(item, one) for one in value)
    if kind is not None and value is not None:
        return from_json(kind, value)
    return float(value) if hint is float else value
