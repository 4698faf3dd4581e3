"""`moac.json` as data: read, checked for version, wholeness and types, and nothing trusted yet."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from moac_runtime.errors import ArtifactError
from moac_runtime.host.files import read_regular
from moac_runtime.package.activations import ACTIVATIONS
from moac_runtime.package.dtypes import DTYPES
from moac_runtime.package.integrity import MANIFEST, REMEDY, FileRecord, unreadable
from moac_runtime.package.json_text import MOST_BYTES, parse_json
from moac_runtime.package.kv_format import PLANNED
from moac_runtime.package.limits import MOST_CONTEXT, MOST_LAYERS, MOST_ROPES, most_of
from moac_runtime.package.records import has_neutral, record_in, records_in
from moac_runtime.package.spec import QK_NORMS, LayerSpec, ModelSpec, NormSpec, RopeSpec
from moac_runtime.package.weight_formats import formats_of, matrix_kinds

FORMAT = "moac"
SCHEMA_VERSION = 3
"""The one that is read and written. An option left out of a spec holds its neutral value, so a
new option needs another version only where packages use it."""

WIDTHS_READER = 4
"""The reader that packages ask for where some KV head holds its keys and values in fewer bits."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The fields of `moac.json`; `capacity` in tokens, `files` by path inside the package.

    `digest`: SHA-256 of all the others, which names the package: it holds those of its files.

    `kv_format`: how keys and values are held, `dtype`, or "planned" where each rule says it.
    `weight_formats`: of each kind of matrix (see `weight_formats.py`), `dtype`, "int8" or "int4".
    """

    model: ModelSpec
    dtype: str
    kv_format: str
    weight_formats: dict[str, str]
    capacity: int
    head_order: tuple[tuple[int, ...], ...]
    targets: tuple[str, ...]
    files: dict[str, FileRecord]
    provenance: dict[str, Any]
    verification: dict[str, Any]
    digest: str


def manifest_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own `digest` field left out."""
    content = {key: value for key, value in data.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ArtifactError."""
    try:
        content = read_regular(path, MOST_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise _no_json(name, error) from error
    return json_object(content, name)


def json_object(content: bytes, name: str) -> dict[str, Any]:
    """The object that the JSON file `name` of a package holds. Raises ArtifactError."""
    try:
        data = parse_json(content)
    except ValueError as error:
        raise _no_json(name, error) from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{name} holds {_kind(data)}, expected a JSON object: {REMEDY}")
    return data


def _no_json(name: str, error: ValueError) -> ArtifactError:
    return ArtifactError(f"{name} is not JSON ({error}), expected JSON: {REMEDY}")


def parse_manifest(data: Mapping[str, Any]) -> Manifest:
    """Check format, version, digest and fields, in this order. Raises ArtifactError."""
    _check_format(data)
    _check_versions(data)
    _check_whole(data)
    spec = _parse_spec(_field(data, "model", dict[str, Any]))
    dtype = _choice(data, "dtype", tuple(DTYPES))
    return Manifest(
        model=spec,
        dtype=dtype,
        kv_format=_kv_format(data, dtype),
        weight_formats=_weight_formats(data, spec, dtype),
        capacity=_positive(data, "capacity"),
        head_order=_head_order(data, spec),
        targets=tuple(_field(data, "targets", list[str])),
        files=_files(data),
        provenance=_field(data, "provenance", dict[str, Any]),
        verification=_field(data, "verification", dict[str, Any]),
        digest=_field(data, "digest", str),
    )


def _check_format(data: Mapping[str, Any]) -> None:
    found = data.get("format")
    if found != FORMAT:
        raise ArtifactError(
            f"{MANIFEST} says format {found!r}, expected {FORMAT!r}: this is no moac package; "
            "give the folder that `moac compile -o` wrote"
        )


def _check_versions(data: Mapping[str, Any]) -> None:
    for name, most in (("schema_version", SCHEMA_VERSION), ("minimum_reader", WIDTHS_READER)):
        found = _positive(data, name)
        if found > most:
            raise ArtifactError(
                f"{MANIFEST} has {name} {found}, but this moac reads up to {most}: "
                "upgrade moac (pip install --upgrade moac)"
            )
        if found < SCHEMA_VERSION:
            raise ArtifactError(
                f"{MANIFEST} has {name} {found}, but this moac reads {SCHEMA_VERSION}: compile "
                "the package again (moac compile CHECKPOINT -o PACKAGE --force), or run it with "
                "the runtime that it carries (python PACKAGE)"
            )


def _check_whole(data: Mapping[str, Any]) -> None:
    found, expected = _field(data, "digest", str), manifest_digest(data)
    if found != expected:
        raise ArtifactError(
            f"{MANIFEST} was altered: its content has SHA-256 {expected}, expected {found} "
            f"as its digest field says: {REMEDY}"
        )


def _parse_spec(data: dict[str, Any]) -> ModelSpec:
    _check_fields("model", data, ModelSpec)
    spec = ModelSpec.from_json(data)
    _check_sizes("model", spec)
    if spec.num_heads % spec.num_kv_heads:
        raise _wrong("model.num_heads", spec.num_heads, f"a multiple of {spec.num_kv_heads}")
    if spec.num_layers > MOST_LAYERS:
        raise _wrong("model.layers", spec.num_layers, f"at most {MOST_LAYERS} of them")
    kinds = range(len(spec.kinds))
    if not spec.layers or any(kind not in kinds for kind in spec.layers):
        raise _wrong("model.layers", list(spec.layers), f"indices into {len(kinds)} kinds")
    if not spec.ropes:
        raise _wrong("model.ropes", [], "at least one rotary table")
    if len(spec.ropes) > MOST_ROPES:
        raise _wrong("model.ropes", len(spec.ropes), f"at most {MOST_ROPES} rotary tables")
    for index, layer in enumerate(spec.kinds):
        _check_layer(f"model.kinds[{index}]", layer, spec)
    for index, rope in enumerate(spec.ropes):
        _check_rope(f"model.ropes[{index}]", rope, spec.head_dim)
    return spec


def _check_rope(name: str, rope: RopeSpec, head_dim: int) -> None:
    _check_sizes(name, rope)
    rotated = head_dim if rope.rotated is None else rope.rotated
    if rotated not in range(2, head_dim + 1, 2):
        raise _wrong(f"{name}.rotated", rotated, f"an even number up to {head_dim}")
    if rotated < 4 and rope.kind == "dynamic":  # its frequencies have the exponent R / (R - 2)
        raise _wrong(f"{name}.rotated", rotated, "at least 4 where the kind is dynamic")
    tables = {"inv_freq": rope.inv_freq}
    if rope.kind == "longrope":
        tables["long_inv_freq"] = rope.long_inv_freq
    for field, table in tables.items():
        if 2 * len(table) != rotated:
            raise _wrong(f"{name}.{field}", f"{len(table)} values", f"{rotated // 2} values")


def _check_layer(name: str, layer: LayerSpec, spec: ModelSpec) -> None:
    _check_sizes(name, layer)
    if layer.rope is not None and layer.rope not in range(len(spec.ropes)):
        raise _wrong(f"{name}.rope", layer.rope, f"an index into {len(spec.ropes)} ropes, or null")
    if layer.activation not in ACTIVATIONS:
        expected = f"one of {', '.join(ACTIVATIONS)}"
        raise _wrong(f"{name}.activation", layer.activation, expected)
    if layer.qk_norm not in (None, *QK_NORMS):
        raise _wrong(f"{name}.qk_norm", layer.qk_norm, f"one of {', '.join(QK_NORMS)}, or null")
    experts = layer.experts
    if experts is not None:
        _check_sizes(f"{name}.experts", experts)
        if experts.chosen > experts.count:
            chosen = f"{name}.experts.chosen"
            raise _wrong(chosen, experts.chosen, f"at most the {experts.count} experts")


def _check_sizes(name: str, record: Any) -> None:
    """Sizes, scales and caps of a record and of its norm are positive; an index may be 0.

    None is larger than any model has: products of sizes then stay within what is counted in.
    """
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, NormSpec):
            _check_sizes(f"{name}.{field.name}", value)
        if type(value) in (int, float) and value <= 0 and field.name != "rope":
            raise _wrong(f"{name}.{field.name}", value, "a positive number")
        most = most_of(field.name, value)
        if most is not None and value > most:
            raise _wrong(f"{name}.{field.name}", value, f"at most {most:g}")


def _check_fields(name: str, data: Any, kind: Any) -> None:
    """Every field of the dataclass `kind` without a neutral value is there, all have their types,
    and nothing else is."""
    if not isinstance(data, dict):
        raise _wrong(name, data, "an object")
    hints = get_type_hints(kind)
    if unknown := sorted(data.keys() - hints.keys()):
        raise _wrong(f"{name}.{unknown[0]}", data[unknown[0]], "no such field")
    for field in fields(kind):
        if has_neutral(field) and field.name not in data:
            continue
        hint = hints[field.name]
        inner = record_in(hint)
        if inner is None:
            _field(data, field.name, hint, name)
            continue
        value = _field(data, field.name, _container(hint), name)
        for place, record in records_in(hint, value):
            _check_fields(f"{name}.{field.name}{place}", record, inner)


def _container(hint: Any) -> Any:
    """What the JSON value of a field that holds records is."""
    if get_origin(hint) is tuple:
        return list[Any]
    return dict | None if get_origin(hint) is UnionType else dict


def _field(data: Mapping[str, Any], key: str, kind: Any, parent: str = "") -> Any:
    name = f"{parent}.{key}" if parent else key
    if key not in data:
        raise ArtifactError(f"{MANIFEST} lacks the field {name!r}: {REMEDY}")
    if not _is(data[key], kind):
        raise _wrong(name, data[key], _spell(kind))
    return data[key]


def _is(value: Any, kind: Any) -> bool:
    """Whether a JSON value fits a type hint; an array fits a tuple, an integer fits a float."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_is(value, one) for one in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_is(item, arguments[0]) for item in value)
    if kind is Any:
        return True
    if origin is dict or kind is dict:
        return isinstance(value, dict)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _spell(kind: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    names |= {NoneType: "null"}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return " or ".join(_spell(one) for one in arguments)
    if origin in (list, tuple):
        items = "" if arguments[0] is Any else f", each item {_spell(arguments[0])}"
        return f"an array{items}"
    return "an object" if dict in (origin, kind) else names[kind]


def _kind(value: Any) -> str:
    return _spell(type(value)) if not isinstance(value, list) else "an array"


def _wrong(name: str, found: Any, expected: str) -> ArtifactError:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ArtifactError(f"{MANIFEST} has {name} = {shown}, expected {expected}: {REMEDY}")


def _positive(data: Mapping[str, Any], key: str) -> int:
    value: int = _field(data, key, int)
    if value < 1:
        raise _wrong(key, value, "a positive number")
    if value > MOST_CONTEXT:
        raise _wrong(key, value, f"at most {MOST_CONTEXT}")
    return value


def _choice(data: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    value: str = _field(data, key, str)
    if value not in choices:
        raise _wrong(key, value, f"one of {', '.join(choices)}")
    return value


def minimum_reader(kv_format: str) -> int:
    """The reader that a package asks for."""
    return WIDTHS_READER if kv_format == PLANNED else SCHEMA_VERSION


def _kv_format(data: Mapping[str, Any], dtype: str) -> str:
    found = _choice(data, "kv_format", (dtype, PLANNED))
    if data["minimum_reader"] != (reader := minimum_reader(found)):
        raise _wrong("minimum_reader", data["minimum_reader"], f"{reader} for kv_format {found!r}")
    return found


def _head_order(data: Mapping[str, Any], spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    order: list[list[int]] = _field(data, "head_order", list[list[int]])
    heads = list(range(spec.num_kv_heads))
    if len(order) != spec.num_layers or any(sorted(layer) != heads for layer in order):
        expected = f"{spec.num_layers} layers, each a permutation of 0 to {len(heads) - 1}"
        raise _wrong("head_order", order, expected)
    return tuple(tuple(layer) for layer in order)


def _weight_formats(data: Mapping[str, Any], spec: ModelSpec, dtype: str) -> dict[str, str]:
    """A format for each kind of matrix that the model has, and for nothing else."""
    found: dict[str, Any] = _field(data, "weight_formats", dict[str, Any])
    kinds = matrix_kinds(spec)
    if sorted(found) != sorted(kinds):
        raise _wrong("weight_formats", found, f"a format for each of {', '.join(kinds)}")
    for kind in found:
        if found[kind] not in (formats := formats_of(kind, dtype)):
            raise _wrong(f"weight_formats.{kind}", found[kind], f"one of {', '.join(formats)}")
    return found


def _files(data: Mapping[str, Any]) -> dict[str, FileRecord]:
    entries: dict[str, Any] = _field(data, "files", dict[str, Any])
    return {name: _record(name, entry) for name, entry in entries.items()}


def _record(name: str, entry: Any) -> FileRecord:
    if not (isinstance(entry, dict) and type(entry.get("size")) is int):
        raise _wrong(f"files[{name!r}]", entry, "size and sha256")
    digest = entry.get("sha256")
    if (
        entry["size"] < 0
        or not isinstance(digest, str)
        or not re.fullmatch("[0-9a-f]{64}", digest)
    ):
        raise _wrong(f"files[{name!r}]", entry, "a size in bytes and a SHA-256 in hex")
    return FileRecord(entry["size"], digest)
