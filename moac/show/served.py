"""What `moac check` found, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moac.show.summary import table

_MIB = 1 << 20


def served_text(found: Mapping[str, Any]) -> str:
    """A served model: its shape and options, the backends that serve it, KV bytes by length."""
    lines = [f"{name:<9} {text}" for name, text in _facts(found)]
    budgets = [name for name in next(iter(found["kv_bytes"].values())) if name != "dense"]
    rows = [
        (f"{length} tokens", *(_mib(held[name]) for name in ("dense", *budgets)))
        for length, held in found["kv_bytes"].items()
    ]
    header = ("capacity", "KV dense", *(f"budget {name}" for name in budgets))
    return "\n".join([*lines, "", table(header, rows)])


def _facts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "source", found["source"]
    yield "served", "yes"
    yield (
        "model",
        f"{found['family']}, {found['num_layers']} layers, {found['num_heads']} query and "
        f"{found['num_kv_heads']} KV heads of {found['head_dim']}",
    )
    millions = found["parameters"] / 1e6
    yield (
        "weights",
        f"{millions:.0f} million, {_mib(found['weight_bytes'])} in {found['dtype']}",
    )
    yield "context", f"{found['context']} tokens"
    for number, option in enumerate(found["options"]):
        yield "" if number else "options", option
    for backend, reason in found["backends"].items():
        yield backend, "yes" if reason is None else f"no: {reason}"


def _mib(count: int) -> str:
    return f"{count / _MIB:.2f} MiB"
