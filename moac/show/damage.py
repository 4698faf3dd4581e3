"""Records of a package that cannot be shown: they are another's writing, and hold anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError

from moac_runtime.errors import ArtifactError

_WRONG = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, TemplateError)


@contextmanager
def telling_damage(package: object) -> Iterator[None]:
    """Raises ArtifactError in place of what a record of another shape raises."""
    try:
        yield
    except _WRONG as error:
        raise ArtifactError(
            f"{package} holds records that cannot be shown ({repr(error)[:100]}), expected those "
            "that moac writes: compile it again"
        ) from error
