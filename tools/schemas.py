"""Write docs/schema: JSON Schemas of a package's moac.json and plan.json.

    python tools/schemas.py docs/schema

The model's part is read from the records that the runtime parses, so that it names every field.
What a schema cannot say (digests, indices, counts that must agree) stands in docs/FORMAT.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from moac_runtime.package.activations import ACTIVATIONS
from moac_runtime.package.dtypes import DTYPES
from moac_runtime.package.kv_format import KV_BITS, PLANNED
from moac_runtime.package.manifest import FORMAT, SCHEMA_VERSION, WIDTHS_READER
from moac_runtime.package.records import has_neutral, record_in
from moac_runtime.package.spec import QK_NORMS, ModelSpec

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
POSITIVE: Schema = {"type": "integer", "minimum": 1}
DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
# What fields of these names may be, beside their type.
_CHOICES = {"activation": list(ACTIVATIONS), "qk_norm": [*QK_NORMS, None]}
_MAY_BE_NOUGHT = ("rope", "layers")
_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}


def manifest_schema() -> Schema:
    """Of moac.json."""
    dtypes = list(DTYPES)
    file = _object({"size": {"type": "integer", "minimum": 0}, "sha256": DIGEST}, closed=False)
    return {
        "$schema": DIALECT,
        "title": "moac.json, the manifest of a moac package",
        **_object(
            {
                "format": {"const": FORMAT},
                "schema_version": {"const": SCHEMA_VERSION},
                "minimum_reader": {"enum": [SCHEMA_VERSION, WIDTHS_READER]},
                "digest": DIGEST,
                "model": record_schema(ModelSpec),
                "dtype": {"enum": dtypes},
                "kv_format": {"enum": [*dtypes, PLANNED]},
                "weight_formats": {
                    "type": "object",
                    "additionalProperties": {"enum": [*dtypes, "int8", "int4"]},
                },
                "capacity": POSITIVE,
                "head_order": _array(_array({"type": "integer", "minimum": 0})),
                "targets": _array({"type": "string"}),
                "files": {"type": "object", "additionalProperties": file},
                "provenance": {"type": "object"},
                "verification": {"type": "object"},
            },
            closed=False,
        ),
    }


def plan_schema() -> Schema:
    """Of what a reader needs of plan.json."""
    rule = {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "number"}, {"enum": list(KV_BITS)}],
        "items": False,
        "minItems": 2,
    }
    return {
        "$schema": DIALECT,
        "title": "plan.json, the span rules of a moac package",
        **_object(
            {
                "rules": {**_array({**_array(rule), "minItems": 1}), "minItems": 1},
                "sink": {"type": "integer", "minimum": 0},
                "block": POSITIVE,
                "min_span": POSITIVE,
                "windows": _array({"anyOf": [POSITIVE, {"type": "null"}]}),
            },
            closed=False,
        ),
    }


def record_schema(kind: Any) -> Schema:
    """Of a record as `records.py` writes it: a field with a neutral value may be left out."""
    hints = get_type_hints(kind)
    needed = [field.name for field in fields(kind) if not has_neutral(field)]
    described = {field.name: _field(field.name, hints[field.name]) for field in fields(kind)}
    return _object(described, needed=needed)


def _field(name: str, hint: Any) -> Schema:
    if name in _CHOICES:
        return {"enum": _CHOICES[name]}
    found = _of(hint)
    numeric = found.get("type") in ("integer", "number") or "anyOf" in found
    if not numeric or record_in(hint) is not None:
        return found
    above = {"minimum": 0} if name in _MAY_BE_NOUGHT else {"exclusiveMinimum": 0}
    return {**found, **above}


def _of(hint: Any) -> Schema:
    """Of a type hint."""
    if get_origin(hint) is tuple:
        return _array(_of(get_args(hint)[0]))
    if get_origin(hint) is UnionType:
        return {"anyOf": [_of(one) for one in get_args(hint)]}
    record = record_in(hint)
    return {"type": _TYPES[hint]} if record is None else record_schema(record)


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(properties: Schema, *, needed: list[str] | None = None, closed: bool = True) -> Schema:
    found: Schema = {
        "type": "object",
        "properties": properties,
        "required": sorted(properties if needed is None else needed),
    }
    return {**found, "additionalProperties": False} if closed else found


SCHEMAS = {"moac.schema.json": manifest_schema, "plan.schema.json": plan_schema}


def written(name: str) -> str:
    """The text of a schema's file."""
    return f"{json.dumps(SCHEMAS[name](), indent=2)}\n"


def main(arguments: list[str] | None = None) -> int:
    """Write all schemas into a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCHEMAS:
        (folder / name).write_text(written(name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
