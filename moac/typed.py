"""Requests made in Python: each value of the type that its field says, or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from moac_runtime.errors import UsageError

_WHOLE = "a whole number"
# What a field's type takes, what becomes of it, and the words for it.
_KINDS: dict[type, tuple[tuple[type, ...], Callable[[Any], Any], str]] = {
    int: ((Integral,), lambda found: found if isinstance(found, int) else int(found), _WHOLE),
    float: ((Real,), lambda found: found if isinstance(found, int) else float(found), "a number"),
    bool: ((bool,), bool, "True or False"),
    str: ((str,), str, "text"),
    Path: ((Path, str), Path, "a path"),
}
_MANY = {int: "whole numbers", str: "names"}


class Default(int):
    """A whole number that stands where none was given, told apart from the same one given."""


def check_types(request: Any) -> None:
    """Raise UsageError for a field of the frozen dataclass `request` that is of another type.

    A path may be given as text and a tuple as a list.
    """
    hints = get_type_hints(type(request))
    for field in fields(request):
        value, hint = getattr(request, field.name), hints[field.name]
        choices = get_args(hint) if NoneType in get_args(hint) else (hint,)
        if value is None and NoneType in choices:
            continue
        kind = next(choice for choice in choices if choice is not NoneType)
        object.__setattr__(request, field.name, _checked(field.name, value, kind))


def check_seed(seed: int) -> None:
    """Raise UsageError for a seed that some generator does not take."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed is {seed}, expected 0 to 2^63 - 1")


def _checked(name: str, value: Any, kind: Any) -> Any:
    if kind in _KINDS:
        return _one(name, value, kind, _KINDS[kind][2])
    each, words = get_args(kind)[0], f"a tuple of {_MANY[get_args(kind)[0]]}"
    if not isinstance(value, (list, tuple)):
        raise _refusal(name, value, words)
    return tuple(_one(name, part, each, words) for part in value)


def _one(name: str, value: Any, kind: type, words: str) -> Any:
    taken, made, _ = _KINDS[kind]
    if not isinstance(value, taken) or (isinstance(value, bool) and kind is not bool):
        raise _refusal(name, value, words)
    return made(value)


def _refusal(name: str, value: Any, words: str) -> UsageError:
    return UsageError(f"{name.replace('_', ' ')} is {value!r:.60}, expected {words}")
