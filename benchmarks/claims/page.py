"""The page: every claim in one table, then what stands behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from told import table

from claims import retrieval, speed, suite
from claims.claim import Claim
from claims.setting import Setting


class Part(NamedTuple):
    """How a part is measured, and what is told of it."""

    measure: Callable[[Setting], dict[str, Any]]
    claims: Callable[[dict[str, Any]], Iterator[Claim]]
    details: Callable[[dict[str, Any]], str]


PARTS: Mapping[str, Part] = {
    "retrieval": Part(retrieval.measure, retrieval.claims, retrieval.details),
    "suite": Part(suite.measure, suite.claims, suite.details),
    "memory": Part(speed.measure_memory, speed.memory_claims, partial(speed.details, "Memory")),
    "throughput": Part(
        speed.measure_throughput, speed.throughput_claims, partial(speed.details, "Throughput")
    ),
}
"""In the order in which they are measured and told."""


def page(result: Mapping[str, Any]) -> str:
    """Everything that is told of the parts there are."""
    rows, details = [], []
    for name, part in PARTS.items():
        if name in result["parts"]:
            found = result["parts"][name]
            for claim in part.claims(found):
                where = _origin(found)
                rows.append([claim.what, claim.ours, claim.paper, claim.how, claim.note, where])
            details.append(part.details(found))
    header = ["claim", "ours", "the paper's", "how ours was measured", "note", "where and when"]
    intro = (
        "# The paper's claims on our model\n\nMoA (arXiv 2406.14909) measured Vicuna-7B and "
        "Llama-3-8B, their speed on an A100; ours is the model named in a row, on the CPU of that "
        "row. Pass keys are in wordings that calibration never uses. Intervals are 95 %."
    )
    return "\n\n".join([intro, table(header, rows), *details]) + "\n"


def _origin(found: Mapping[str, Any]) -> str:
    """Model, host, date and versions of a part, which may differ from another's."""
    host, versions = found["host"], found["versions"]
    told = ", ".join(f"{name} {versions[name]}" for name in ("moac", "torch", "transformers"))
    return (
        f"{found['model']}; {host['processor']}, {host['cores']} cores, {host['memory_gib']} GiB; "
        f"{found['date'][:16].replace('T', ' ')}; {told}"
    )
