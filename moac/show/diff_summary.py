"""`moac diff` for people: tables of what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from moac.show.summary import table
from moac_runtime.errors import plain_line

_MIB = 1 << 20
_NOTHING = "-"
_FULL = 16  # more bits than any width that a rule names


def diff_text(found: Mapping[str, Any]) -> str:
    """What `diffing.diff` found, as blocks of text with an empty line between them."""
    blocks = [_sides(found), _lengths_table(found)]
    blocks += [] if found["same_spans"] else [_layers_table(found)]
    blocks += [*_losses_table(found), _differences_table(found), *_files_table(found)]
    return "\n\n".join(blocks)


def _sides(found: Mapping[str, Any]) -> str:
    lines = [
        f"{side}  {found[side]['kind']:<7}  {plain_line(found[side]['path'])}"
        for side in ("a", "b")
    ]
    if found["same_spans"]:
        lines.append("every span is the same at every planned length")
    if found["widths"]:
        narrower = sum((b or _FULL) < (a or _FULL) for _, _, a, b in found["widths"])
        lines.append(
            f"{len(found['widths'])} KV heads hold keys and values in another width, {narrower} "
            "of them in fewer bits in b"
        )
    return "\n".join(lines)


def _lengths_table(found: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{n} tokens",
            f"{spans['differ']} of {spans['heads']}",
            spans["longer"],
            spans["shorter"],
            *(f"{found['density'][n][side]:.4f}" for side in ("a", "b")),
            *(_mib(found["kv_bytes"][n][side]) for side in ("a", "b")),
        )
        for n, spans in found["spans"].items()
    ]
    header = ("at", "spans differ", "longer in b", "shorter",
              "density a", "density b", "KV in a", "KV in b")  # fmt: skip
    return table(header, rows)


def _layers_table(found: Mapping[str, Any]) -> str:
    """For each layer that differs: how many heads, and the tokens that b keeps more or less."""
    spans = found["spans"]
    layers = range(len(next(iter(spans.values()))["layers"]))
    rows = [
        (f"layer {layer}", *(_layer_cell(at, layer) for at in spans.values()))
        for layer in layers
        if any(at["layers"][layer] for at in spans.values())
    ]
    return table(("heads that differ, tokens in b", *(f"at {n}" for n in spans)), rows)


def _layer_cell(at: Mapping[str, Any], layer: int) -> str:
    changed = [b - a for where, _, a, b in at["changes"] if where == layer]
    return f"{len(changed)}, {sum(changed):+d}" if changed else _NOTHING


def _losses_table(found: Mapping[str, Any]) -> Iterator[str]:
    """The measured losses; nothing where neither side holds one."""
    sides = {side: found["losses"][side] for side in ("a", "b") if found["losses"][side]["plans"]}
    if not sides:
        return
    domains = list(
        dict.fromkeys(d for s in sides.values() for p in s["plans"].values() for d in p)
    )
    domains = [*(d for d in domains if d != "mean"), "mean"]
    rows = [
        (f"{kind}, {side} at {told['length']} tokens",
         *(_loss(told["plans"][kind].get(domain)) for domain in domains))
        for kind in ("chosen", "uniform", "dense")
        for side, told in sides.items()
        if kind in told["plans"]
    ]  # fmt: skip
    text = table(("loss", *domains), rows)
    if len(sides) == 2 and not found["losses_comparable"]:
        text += "\na and b were measured on different samples: compare each with its own dense"
    yield text


def _differences_table(found: Mapping[str, Any]) -> str:
    if not found["differences"]:
        return "settings and provenance are the same"
    lines = [
        f"{plain_line(row['name'])}\n  a  {_value(row['a'])}\n  b  {_value(row['b'])}"
        for row in found["differences"]
    ]
    return "\n".join(["settings and provenance that differ", *lines])


def _files_table(found: Mapping[str, Any]) -> Iterator[str]:
    """The files that differ and why; nothing beside a plan alone."""
    files = found["files"]
    if files is None:
        return
    because = files["because"]
    if not because:
        yield f"all {files['same']} files are the same, byte for byte{_told_builds(found)}"
        return
    where = {"differ": "differ", "only_a": "in a alone", "only_b": "in b alone"}
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, told in where.items():
        for name in files[kind]:
            why = ", ".join(because[name]) or "nothing that is recorded tells why"
            groups.setdefault((told, why), []).append(name)
    lines = [f"{len(because)} files differ, {files['same']} are the same"]
    for (told, why), names in groups.items():
        lines += [f"{told}, because of: {why}", *(f"  {name}" for name in names)]
    yield "\n".join(lines)


def _told_builds(found: Mapping[str, Any]) -> str:
    """When equal packages were made, where both tell and it was not at once."""
    a, b = (found["builds"][side] for side in ("a", "b"))
    if not a or not b or a == b:
        return ""
    lines = [
        f"  {side}  {told['created']} in {told['seconds']:.0f} s, {told['threads']} threads of "
        f"{told['processor']}"
        for side, told in (("a", a), ("b", b))
    ]
    return "\n".join(["; made at different times", *lines])


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else _NOTHING if value is None else json.dumps(value)
    return plain_line(text)


def _mib(count: int | None) -> str:
    return _NOTHING if count is None else f"{count / _MIB:.2f} MiB"


def _loss(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"
