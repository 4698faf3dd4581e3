"""Tables for people: of a compile, an estimate, a package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from moac.origin import told_model, told_plan
from moac.show.inspection import chosen_plan, inspect_package, planned_lengths
from moac.show.terminal_map import Look, span_map

if TYPE_CHECKING:
    from moac.pipeline.compiler import CompileResult
    from moac.pipeline.estimate import StageEstimate
    from moac.pipeline.planner import PlanResult

_MIB = 1 << 20
_LITTLE = (
    0.01  # nats a token: a hundredth of perplexity, which few samples do not tell from chance
)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as they need to be, text to the left and numbers to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def plan_summary(result: PlanResult) -> str:
    """The plan's figures, what was measured and predicted."""
    record = result.record
    lengths = planned_lengths(record)
    rows = [(f"{n} tokens", f"{record['density'][str(n)]:.4f}") for n in lengths]
    parts = [
        _validation_table(record),
        table(("capacity", "density"), rows),
        "\n".join(f"{name:<9} {text}" for name, text in goal_facts(record)),
        f"time      {result.seconds:.0f} s",
        f"memory    {result.peak_memory_bytes / 2**30:.2f} GiB at most",
        f"plan      {result.path}",
    ]
    return "\n\n".join(parts[:3]) + "\n" + "\n".join(parts[3:])


def goal_facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What was asked for and what it came to; the predicted loss beside the measured one."""
    facts = [("budget", f"{record['budget']:.4f} of the dense KV memory")]
    if "max_loss" in record:
        facts = [("budget", f"{record['budget']:.4f}, the least with at most "
                  f"{record['max_loss']:g} nats a token predicted to be lost")]  # fmt: skip
    facts += held_facts(record["largest_density"], record)
    if "kv_cap" in record:
        cap = record["kv_cap"]
        facts.append(
            ("KV cap", f"{cap['held_bytes']} of {cap['max_bytes']} bytes for a batch of "
             f"{cap['batch']} at {cap['length']} tokens")
        )  # fmt: skip
    if "predicted_loss" in record:
        found = record["predicted_loss"]
        low, high = found["interval"]
        facts.append(
            ("predicted", f"{found['loss']:.4f} nats a token above dense at {found['length']} "
             f"tokens, {found['level']:.0%} interval {low:.4f} to {high:.4f}")
        )  # fmt: skip
    return facts + uniform_facts(record)


def uniform_facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where one span for all heads, of the same memory, lost less than the plan."""
    rows = {row["plan"]: row["losses"] for row in record["measured_loss"]}
    own, uniform = rows.get(chosen_plan(record), {}), rows.get("uniform", {})
    more = {kind: loss - uniform.get(kind, loss) for kind, loss in own.items()}
    worse = {kind: lost for kind, lost in more.items() if lost > _LITTLE}
    if not worse:
        return []
    told = " and ".join(f"{lost:.3f} of {kind}" for kind, lost in worse.items())
    return [
        ("weak", f"one span for all heads loses less here, by {told}: compare them with moac eval "
         "before you rely on the plan for it, or give a larger --budget")
    ]  # fmt: skip


def held_facts(largest: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The most that any session holds, and from where on nothing else is known."""
    profiled = record["lengths"][-1]
    facts = [
        ("held", f"at most {largest['density']:.4f} of it from {largest['shortest']} to "
         f"{largest['longest']} tokens, at {largest['length']}")
    ]  # fmt: skip
    if largest["longest"] > profiled:
        facts.append(
            ("beyond", f"past {profiled} tokens no loss was measured; only what is held is known")
        )
    return facts


def compile_summary(result: CompileResult) -> str:
    """The plan's figures, what was measured, and the checks the package passed."""
    out = StringIO()
    print(_validation_table(result.record), file=out)
    print(file=out)
    print(_density_table(inspect_package(result.path)), file=out)
    print(file=out)
    for name, text in goal_facts(result.record):
        print(f"{name:<9} {text}", file=out)
    passed = sum(check.ok for check in result.checks)
    print(f"checks    {passed} of {len(result.checks)} hold", file=out)
    print(f"time      {result.seconds:.0f} s", file=out)
    print(f"memory    {result.peak_memory_bytes / 2**30:.2f} GiB at most", file=out)
    print(f"package   {result.path}", end="", file=out)
    return out.getvalue()


def _windows(windows: Sequence[int | None]) -> list[tuple[str, str]]:
    """What layers hold by themselves, where they do not hold everything."""
    own = [window for window in windows if window is not None]
    if not own:
        return []
    told = " or ".join(f"{window} tokens" for window in sorted(set(own)))
    return [
        ("windows", f"{len(own)} of {len(windows)} layers see their last {told} alone, and shares "
         "are of what the model holds so")
    ]  # fmt: skip


def inspection_text(found: dict[str, Any], look: Look) -> str:
    """A package for the eye: model, densities, losses, the span heat map, provenance."""
    model, provenance = found["model"], found["provenance"]
    versions = ", ".join(f"{name} {text}" for name, text in provenance["versions"].items())
    facts = [
        ("package", found["path"]),
        (
            "model",
            f"{model['family']}, {model['num_layers']} layers, {model['num_heads']} query "
            f"and {model['num_kv_heads']} KV heads of {model['head_dim']}",
        ),
        ("weights", f"{found['weight_bytes'] / _MIB:.1f} MiB, {_stored(found)}"),
        ("capacity", f"{found['capacity']} tokens"),
        *_windows(model["windows"]),
        ("targets", ", ".join(found["targets"])),
        ("kernels", _kernels(found["kernels"])),
        ("cpu", _cpu(found)),
        (
            "budget",
            f"{found['budget']:g}, sink {found['sink']}, block {found['block']}, "
            f"smallest span {found['min_span']}",
        ),
        *held_facts(found["largest_density"], found["planning"]),
        *uniform_facts(found["planning"]),
        *([("plan", taken)] if (taken := told_plan(provenance)) else []),
        *_effort(found["planning"]),
        *_prompts(found["planning"]),
        ("source", told_model(provenance)),
        ("made", f"with {versions}{_when(found['build'])}"),
    ]
    out = StringIO()
    for name, text in facts:
        print(f"{name:<9} {text}", file=out)
    print(f"\n{_density_table(found)}", file=out)
    print(f"\n{_validation_table(found['planning'])}", file=out)
    print(f"\n{span_map(found, look)}", end="", file=out)
    return out.getvalue()


def _when(build: Mapping[str, Any] | None) -> str:
    if build is None:
        return ""
    seconds = sum(build["seconds"].values())
    return (
        f"; on {build['created']} in {seconds:.0f} s, with {build['threads']} threads of "
        f"{build['processor']}"
    )


def _effort(planning: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured to make the plan, where it tells."""
    asked = planning.get("arguments", {})
    if "effort" not in asked:
        return []
    lengths = ", ".join(map(str, planning["lengths"]))
    return [
        (
            "effort",
            f"{asked['effort']}: profiled at {lengths} tokens, {asked['samples']} samples of text "
            f"at the shortest, {asked['plans']} plans measured",
        )
    ]


def _prompts(planning: dict[str, Any]) -> list[tuple[str, str]]:
    """How the model was asked while it was measured, where the plan tells it."""
    told = {
        "chat": "the chat template's",
        "raw": "plain text, as of run --raw: there is no chat template that can be used",
    }
    return [("prompts", told[kind])] if (kind := planning.get("prompts")) in told else []


def _stored(found: dict[str, Any]) -> str:
    dtype: str = found["dtype"]
    narrow = {
        "int8": f"int8, norms and biases {dtype}",
        "int4": f"int4, embedding and head int8, norms and biases {dtype}",
        "mixed": f"int8 and {dtype}",
    }
    return narrow.get(found["weights"], dtype)


def _cpu(found: dict[str, Any]) -> str:
    built = ", ".join(kernel["instruction_set"] for kernel in found["cpu_kernels"])
    note = found["cpu_note"]
    return built if note is None else f"torch's own operators here: {note}"


def _kernels(built: list[dict[str, Any]]) -> str:
    archs = dict.fromkeys(kernel["arch"] for kernel in built)
    return ", ".join(archs) or "none: no cuda target"


def estimate_table(stages: Sequence[StageEstimate]) -> str:
    """What a compile would do, how long and in how much memory."""
    rows = [
        (stage.name, stage.work, f"{stage.seconds:.0f} s", f"{stage.memory_bytes / 2**30:.1f} GiB")
        for stage in stages
    ]
    total = sum(stage.seconds for stage in stages)
    peak = max(stage.memory_bytes for stage in stages) / 2**30
    rows.append(("all", "", f"{total:.0f} s", f"{peak:.1f} GiB"))
    return table(("stage", "work", "time", "memory"), rows)


def _validation_table(record: dict[str, Any]) -> str:
    rows, chosen = record["measured_loss"], chosen_plan(record)
    domains = list(rows[0]["losses"])
    return table(
        (f"loss at {record['unseen']} tokens", *domains, "mean"),
        [
            (f"{row['plan']}{' *' if row['plan'] == chosen else ''}",
             *(f"{row['losses'][d]:.3f}" for d in domains), f"{row['loss']:.3f}")
            for row in rows
        ],
    )  # fmt: skip


def _density_table(found: dict[str, Any]) -> str:
    rows = [
        (f"{n} tokens", f"{found['density'][str(n)]:.4f}",
         f"{found['kv_bytes'][str(n)]['held'] / _MIB:.2f} MiB",
         f"{found['kv_bytes'][str(n)]['dense'] / _MIB:.2f} MiB")
        for n in found["lengths"]
    ]  # fmt: skip
    return table(("capacity", "density", "KV held", "KV dense"), rows)
