"""What every benchmark tells beside its figures: host, date and versions; tables in Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moac.bench.machine import machine, versions
from moac.store.atomic import write_whole
from moac_runtime.errors import MoacError

RESULTS = Path(__file__).parent / "results"


def origin() -> dict[str, Any]:
    """`date`, `host` with the load of its processors now, and `versions`."""
    found = machine("cpu")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": {
            "processor": found["processor"],
            "cores": found["cores"],
            "memory_gib": round(found["memory_bytes"] / 2**30, 1),
            "system": found["system"],
            "load_average": [round(load, 1) for load in os.getloadavg()],
        },
        "versions": versions(),
    }


def origin_lines(found: Mapping[str, Any]) -> list[str]:
    """What `origin` told, as lines of a list in Markdown."""
    host = found["host"]
    load = ", ".join(map(str, host["load_average"]))
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [
        f"- date: {found['date']}",
        f"- host: {host['processor']}, {host['cores']} cores, {host['memory_gib']} GiB, "
        f"{host['system']}, load {load}",
        f"- versions: {names}",
    ]


def default_out(name: str) -> Path:
    """Where the results of today are written: `benchmarks/results/NAME-<date>.json`."""
    return RESULTS / f"{name}-{datetime.now(UTC).date().isoformat()}.json"


def read_results(path: Path, name: str) -> dict[str, Any]:
    """What `write` left of the benchmark `name`. Raises MoacError where that is not there."""
    remedy = "leave --table-only out to measure, or name its results with --out"
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise MoacError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise MoacError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(found, dict) or found.get("benchmark") != name:
        raise MoacError(f"{path} holds no results of {name}.py; {remedy}")
    return found


def write(path: Path, result: Mapping[str, Any], page: str) -> None:
    """Write the results to `path`, and the page in Markdown beside it. Raises MoacError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{json.dumps(result, indent=1)}\n".encode())
        write_whole(path.with_suffix(".md"), page.encode())
    except OSError as error:
        raise MoacError(
            f"{path} could not be written ({error.strerror}); give --out a file that can be"
        ) from error


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def percent(share: float, interval: Sequence[float] | None = None) -> str:
    """A share in percent, with its interval: `86 (74 to 93)`."""
    if interval is None:
        return f"{100 * share:.0f}"
    low, high = interval
    return f"{100 * share:.0f} ({100 * low:.0f} to {100 * high:.0f})"
