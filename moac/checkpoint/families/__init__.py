"""The families that are served, one to a file; here they are found.

A new one is its file, which declares a `FAMILY`, and an entry in `tests/families.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from moac.checkpoint.families import options, reading, unserved
from moac.checkpoint.families.family import Family, Gguf, Names
from moac_runtime.package.limits import MOST_CONTEXT
from moac_runtime.package.spec import ModelSpec

__all__ = [
    "FAMILIES",
    "Family",
    "Gguf",
    "Names",
    "family_of",
    "gguf_family",
    "model_spec",
    "parse_config",
]


def _declared() -> Iterator[Family]:
    """What the files of this folder declare, in the order of their names."""
    for name in sorted(module.name for module in iter_modules(__path__)):
        family = getattr(import_module(f"{__name__}.{name}"), "FAMILY", None)
        if family is not None:
            yield family


FAMILIES: dict[str, Family] = {family.model_type: family for family in _declared()}
_GGUF, _GGUF_MIXTURES = (
    {
        own.gguf.architecture: own
        for own in FAMILIES.values()
        if own.gguf.architecture and own.gguf.mixture == mixture
    }
    for mixture in (False, True)
)


def family_of(model_type: object) -> Family:
    """The family of a `model_type`. Raises CheckpointError where none is served."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise options.refuse("model_type", model_type, ", ".join(FAMILIES))
    return family


def gguf_family(architecture: str, experts: int = 0) -> Family:
    """The family of llama.cpp's files of an `architecture` with so many `experts`.

    Raises CheckpointError where none is served.
    """
    if experts and architecture in _GGUF_MIXTURES:
        return _GGUF_MIXTURES[architecture]
    if architecture not in _GGUF:
        unserved.check_architecture(architecture)
        raise options.refuse("GGUF architecture", architecture, ", ".join(_GGUF))
    return _GGUF[architecture]


def parse_config(values: Mapping[str, Any], where: str) -> Any:
    """The transformers config of a raw config.json, `where` naming it for the sentence.

    Older files (`rope_theta`, `rope_scaling`, `torch_dtype`) are upgraded as transformers does.
    Raises CheckpointError for what is not served or is no config.
    """
    unserved.check_kind(values)
    options.check_config_file(values, family_of(values.get("model_type")))
    return reading.parsed(values, where)


def model_spec(config: Any) -> ModelSpec:
    """The spec of a served config. Raises CheckpointError naming what is not served."""
    family = family_of(config.model_type)
    options.check_config_file(config.to_dict(), family)
    reading.check_sizes(config, family.epsilon)
    spec = family.spec(config)
    if spec.context > MOST_CONTEXT:
        raise options.refuse("a context of", spec.context, f"at most {MOST_CONTEXT} tokens")
    return spec
