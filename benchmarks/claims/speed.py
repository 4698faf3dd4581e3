"""KV and whole memory against dense, and decode throughput within equal KV memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluated import DENSE
from made import UNIFORM
from told import origin, table

from claims.claim import Claim, times
from claims.setting import OURS, Setting
from moac.bench.plans import system_plan
from moac.bench.request import BenchRequest
from moac.bench.runner import run_bench
from moac.store.atomic import write_whole
from moac_runtime.errors import UsageError
from moac_runtime.package.artifact import Artifact, open_artifact

_MIB = 1 << 20
_GROWING, _STATIC = "hf", "hf-static"
_RIVALS = {
    _GROWING: ("transformers' growing cache", "6.6x to 8.2x (with FlashAttention2, A100)"),
    _STATIC: ("transformers' static cache, compiled", "2.1x to 2.8x (A100)"),
    UNIFORM: ("a uniform window of equal density in our runtime", "1.11x to 1.16x (A100)"),
    DENSE: ("our runtime with nothing dropped", "-"),
}
_TOTAL = "1.2x to 1.4x in all"
_MEMORY_TOKENS = 8  # steps: memory is settled by then


def measure_memory(setting: Setting) -> dict[str, Any]:
    """What our plan and dense hold at the batch that dense fits into the KV memory."""
    setting.prepare(setting.budgets[:1])
    artifact = open_artifact(setting.package, check="sizes")
    tokens = min(_MEMORY_TOKENS, setting.tokens)
    batch = _rows(setting, artifact, DENSE, setting.context + tokens)
    found = _bench(setting, "memory", against=(DENSE,), batch=batch, tokens=tokens)
    return _part(setting, [found]) | {"weight_bytes": _weight_bytes(artifact)}


def measure_throughput(setting: Setting) -> dict[str, Any]:
    """Our plan and what it is compared with, each at the batch that the KV memory holds."""
    setting.prepare(setting.budgets[:1])
    artifact = open_artifact(setting.package, check="sizes")
    capacity = setting.context + setting.tokens
    full = _rows(setting, artifact, DENSE, capacity)
    sparse = _rows(setting, artifact, OURS, capacity)
    runs = [
        _bench(setting, "full", against=(*setting.against, DENSE), batch=full),
        _bench(setting, "sparse", against=(UNIFORM,), batch=sparse),
    ]
    return _part(setting, runs) | {"kv_mib": setting.kv_mib}


def _part(setting: Setting, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs as a part: where and when is that of the earliest."""
    told = min((run["origin"] for run in runs), key=lambda origin: origin["date"])
    return {**told, "effort": setting.effort, "runs": runs}


def _weight_bytes(artifact: Artifact) -> int:
    files = artifact.files.items()
    return sum(file.size for name, file in files if name.startswith("weights/"))


def _rows(setting: Setting, artifact: Artifact, system: str, capacity: int) -> int:
    """How many rows of `capacity` tokens the KV memory holds for a system."""
    plan = system_plan(system, artifact.plan, capacity, artifact.kv)
    row = plan.held_bytes(capacity, artifact.kv)
    rows = min(setting.kv_mib * _MIB // row, setting.most_rows)
    if not rows:
        raise UsageError(
            f"a row of {capacity} tokens takes {row / _MIB:.0f} MiB of KV memory and --kv-mib is "
            f"{setting.kv_mib}; give more, or a shorter --context"
        )
    return rows


def _bench(
    setting: Setting,
    name: str,
    *,
    against: Sequence[str],
    batch: int,
    tokens: int | None = None,
) -> dict[str, Any]:
    """What `moac bench` finds, kept in the work folder under what was asked of which package."""
    request = BenchRequest(
        package=setting.package,
        source=setting.model,
        against=tuple(against),
        batches=(batch,),
        contexts=(setting.context,),
        tokens=tokens or setting.tokens,
        repeats=setting.repeats,
    )
    manifest = hashlib.sha256((setting.package / "moac.json").read_bytes()).hexdigest()
    asked = json.loads(json.dumps({**asdict(request), "manifest": manifest}, default=str))
    path = Path(setting.work_dir, "bench", f"{name}.json")
    if path.exists() and not setting.again:
        known: dict[str, Any] = json.loads(path.read_bytes())
        if known["asked"] == asked:
            return known
    before = origin()  # the load that others make, and not the run
    found = {"asked": asked, "origin": before, **run_bench(request).to_json()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(found, indent=1).encode())
    return found


def memory_claims(part: dict[str, Any]) -> Iterator[Claim]:
    """KV memory, weights and KV memory, and all that a process holds, dense's over ours."""
    (run,) = part["runs"]
    ours, dense = (_row(run, name) for name in (OURS, DENSE))
    how = (
        f"{ours['batch']} rows of {ours['context']} tokens, density {ours['density']:.3f}, our "
        "runtime under both plans"
    )
    for what, paper, name, more in (
        ("KV memory", "-", "kv_bytes", 0),
        ("weights and KV memory", _TOTAL, "kv_bytes", part["weight_bytes"]),
        ("all memory of the process at its peak", _TOTAL, "peak_bytes", 0),
    ):
        small, large = ours[name] + more, dense[name] + more
        found = f"{times(large / small)}: {large / _MIB:.1f} to {small / _MIB:.1f} MiB"
        yield Claim(f"{what}, dense's over ours", found, paper, how)


def throughput_claims(part: dict[str, Any]) -> Iterator[Claim]:
    """Tokens a second of our plan at its batch, over every other system's at its own."""
    full, sparse = part["runs"]
    ours = _row(sparse, OURS)
    for row in (*full["rows"], *sparse["rows"]):
        if row["system"] == OURS:
            continue
        what, paper = _RIVALS.get(row["system"], (row["system"], "-"))
        yield Claim(
            f"decode throughput on a CPU, times {what}",
            f"{_ratio(ours, row)}: {ours['tokens_per_s']:.1f} to {row['tokens_per_s']:.1f} "
            "tokens/s",
            paper,
            f"{part['kv_mib']} MiB of KV memory hold {ours['batch']} rows of ours and "
            f"{row['batch']} of the other, {ours['context']} tokens of context; medians of steps, "
            "in brackets of blocks of steps",
            "a CPU, not a GPU",
        )


def _ratio(ours: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """And its ends between blocks of steps, the slowest of one over the fastest of the other."""
    speeds = [
        [r["batch"] * 1e3 / ms for ms in reversed(r["decode_ms_blocks"])] for r in (ours, row)
    ]
    (low, high), (other_low, other_high) = speeds
    return times(ours["tokens_per_s"] / row["tokens_per_s"], (low / other_high, high / other_low))


def details(title: str, part: dict[str, Any]) -> str:
    """Every row of the runs, in Markdown."""
    header = ["system", "rows", "context", "density", "dtype", "prefill s", "ms/step", "tokens/s",
              "KV MiB", "peak MiB"]  # fmt: skip
    rows = [
        [
            *(row[name] for name in ("system", "batch", "context")),
            f"{row['density']:.3f}",
            row["dtype"],
            f"{row['prefill_s']:.1f}",
            f"{row['decode_ms_p50']:.1f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['kv_bytes'] / _MIB:.1f}",
            f"{row['peak_bytes'] / _MIB:.0f}",
        ]
        for run in part["runs"]
        for row in run["rows"]
    ]
    lines = [_run_line(run) for run in part["runs"]]
    return "\n\n".join([f"## {title}", "\n".join(lines), table(header, rows)])


def _run_line(run: Mapping[str, Any]) -> str:
    """When a run began, and what else the machine did: speed wants a quiet one."""
    where = run["origin"]
    load = ", ".join(map(str, where["host"]["load_average"]))
    return (
        f"- {where['date']}, a CPU, {run['machine']['threads']} threads, load before it {load}, "
        f"read bandwidth {run['read_bandwidth_gbs']:.1f} GB/s"
    )


def _row(run: Mapping[str, Any], system: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in run["rows"] if row["system"] == system)
    return found
