"""Two plans or packages compared: spans, density, KV bytes, losses, provenance and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moac.packaging.build_record import read_build
from moac.show.file_diff import MACHINE, file_diff, package_facts
from moac.show.inspection import chosen_plan, planned_lengths
from moac_runtime.errors import ArtifactError, UsageError
from moac_runtime.package.artifact import Artifact, load_plan_record, open_artifact
from moac_runtime.package.integrity import MANIFEST, sha256
from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.manifest import read_json
from moac_runtime.package.plan import Plan

_SETTINGS = ("budget", "lengths", "extrapolated", "unseen", "rules_per_layer")
_RULES = ("sink", "block", "min_span", "windows")
_PROVENANCE = ("source", "revision", "identity", "plan", "device", "measured_in")
_SAME_LOSS = 1e-4  # nats: what reordered sums may change in the dense model's loss


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two. `lengths`: the planned ones, in tokens. `losses`: by the kind of plan
    (`chosen`, `uniform`, `dense`), then by domain, in nats at `unseen` tokens.

    `kv`: a key of the package, for its bytes; None where a plan stands alone, which does not tell
    the model. `facts`: settings and provenance by name. `files`: SHA-256 by name, `build`: what
    `build.json` tells, and `told`: what files follow from besides; of a plan alone, and where
    there is none, all three are empty.
    """

    path: Path
    kind: str
    plan: Plan
    lengths: tuple[int, ...]
    unseen: int | None
    losses: Mapping[str, Mapping[str, float]]
    kv: KvShape | None
    facts: Mapping[str, Any]
    files: Mapping[str, str]
    build: Mapping[str, Any]
    told: Mapping[str, Any]


def open_side(path: Path) -> Side:
    """The package or the `plan.json` at `path`. Raises ArtifactError."""
    if path.is_file():
        return _side(path, "plan", read_json(path, str(path)), None)
    if not path.exists():
        raise ArtifactError(
            f"{path} does not exist, expected a package or a plan.json: check the path"
        )
    artifact = open_artifact(path)
    return _side(path, "package", load_plan_record(artifact), artifact)


def diff(a: Side, b: Side) -> dict[str, Any]:
    """How `b` differs from `a`, as JSON values; everything by length has the length as a string.

    `spans` give for each length `heads`, `differ`, `longer` and `shorter` in b (heads), `layers`
    (heads that differ, by layer) and `changes` (`[layer, kv_head, span in a, span in b]`).
    `widths`: `[layer, kv_head, bits in a, bits in b]` of heads whose widths differ, None for the
    package's dtype. `files`: see `file_diff`, None beside a plan alone; `builds`: when, on what
    and in how many seconds each was made, which no file follows from but by the order of sums.
    `losses_comparable`: whether both measured the dense model alike, so on equal samples. Raises
    UsageError where the plans are of different shape or name no length.
    """
    _check_shapes(a, b)
    lengths = sorted({*a.lengths, *b.lengths})
    if not lengths:
        raise UsageError(
            f"neither {a.path} nor {b.path} names its planned lengths, expected lengths in one of "
            "them: give a plan.json that moac wrote"
        )
    spans = {str(n): _spans(a.plan, b.plan, n) for n in lengths}
    return {
        "a": {"path": str(a.path), "kind": a.kind},
        "b": {"path": str(b.path), "kind": b.kind},
        "same_spans": all(found["differ"] == 0 for found in spans.values()),
        "lengths": lengths,
        "spans": spans,
        "widths": _widths(a.plan, b.plan),
        "density": {str(n): _pair(a.plan.density(n), b.plan.density(n)) for n in lengths},
        "kv_bytes": {str(n): _pair(_bytes(a, n), _bytes(b, n)) for n in lengths},
        "losses": {
            "a": {"length": a.unseen, "plans": a.losses},
            "b": {"length": b.unseen, "plans": b.losses},
        },
        "losses_comparable": _comparable(a, b),
        "differences": _differences(a.facts, b.facts),
        "files": _files(a, b),
        "builds": {"a": dict(a.build), "b": dict(b.build)},
    }


def _side(path: Path, kind: str, record: dict[str, Any], artifact: Artifact | None) -> Side:
    try:
        plan = Plan.from_json(record)
        return Side(
            path=path,
            kind=kind,
            plan=plan,
            lengths=_lengths(record),
            unseen=None if record.get("unseen") is None else int(record["unseen"]),
            losses=_losses(record),
            kv=None if artifact is None else artifact.kv,
            facts=_facts(plan, record, artifact),
            files={} if artifact is None else _hashes(artifact),
            build={} if artifact is None else _build(artifact),
            told={} if artifact is None else package_facts(artifact),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{path} holds no plan that moac wrote ({error!r}), expected rules, sink, block, "
            "min_span and windows: give a plan.json or a package"
        ) from error


def _lengths(record: dict[str, Any]) -> tuple[int, ...]:
    """The planned lengths, none where rules stand alone. Raises ValueError for one below 1."""
    lengths = tuple(map(int, planned_lengths(record))) if "lengths" in record else ()
    if lengths and min(lengths) < 1:
        raise ValueError(f"a length of {min(lengths)} tokens")
    return lengths


def _losses(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The measured losses of the plans that every record names; without the front's others."""
    names = {"uniform": "uniform", "dense": "dense"}
    names[chosen_plan(record)] = "chosen"
    return {
        names[row["plan"]]: {
            domain: float(loss) for domain, loss in (*row["losses"].items(), ("mean", row["loss"]))
        }
        for row in record.get("measured_loss", ())
        if row["plan"] in names
    }


def _facts(plan: Plan, record: Mapping[str, Any], artifact: Artifact | None) -> dict[str, Any]:
    rules = plan.to_json()
    facts = {name: record[name] for name in _SETTINGS if name in record}
    facts |= {name: rules[name] for name in _RULES}
    if artifact is None:
        made = record.get("model", {})
        return facts | {name: made[name] for name in _PROVENANCE if name in made}
    origin = artifact.provenance
    facts |= {"dtype": artifact.dtype, "capacity": artifact.capacity}
    facts["targets"] = list(artifact.targets)
    facts |= {name: origin[name] for name in _PROVENANCE if name in origin}
    asked = origin.get("arguments", {}).items()
    facts |= {f"argument {name}": value for name, value in asked if name not in facts}
    return facts | {f"{name} version": v for name, v in origin.get("versions", {}).items()}


def _hashes(artifact: Artifact) -> dict[str, str]:
    """Every file's, as opening it has proven, and the manifest's own."""
    found = {name: record.sha256 for name, record in artifact.files.items()}
    return {**found, MANIFEST: sha256(artifact.root / MANIFEST)}


def _build(artifact: Artifact) -> dict[str, Any]:
    record = read_build(artifact.root)
    if record is None:
        return {}
    seconds = round(sum(record["seconds"].values()), 2)
    return {**{name: record[name] for name in ("created", *MACHINE)}, "seconds": seconds}


def _files(a: Side, b: Side) -> dict[str, Any] | None:
    if not a.files or not b.files:
        return None
    one, other = ({**side.facts, **side.told, **_machine(side)} for side in (a, b))
    differing = [row["name"] for row in _differences(one, other)]
    rounded = any(side.facts.get("argument weights") == "int4" for side in (a, b))
    return file_diff(a.files, b.files, differing, rounded=rounded)


def _machine(side: Side) -> dict[str, Any]:
    """What of `build.json` decides the order of sums; no file follows from the rest."""
    return {name: side.build[name] for name in MACHINE if name in side.build}


def _check_shapes(a: Side, b: Side) -> None:
    shapes = [(len(side.plan.rules), len(side.plan.rules[0])) for side in (a, b)]
    if shapes[0] != shapes[1]:
        told = [f"{layers} layers of {heads} KV heads" for layers, heads in shapes]
        raise UsageError(
            f"{a.path} is for a model of {told[0]} and {b.path} for one of {told[1]}, expected "
            "two plans of one model: their spans cannot be compared"
        )


def _spans(a: Plan, b: Plan, length: int) -> dict[str, Any]:
    pairs = [
        (layer, head, one.size, other.size)
        for layer, rows in enumerate(zip(a.spans(length), b.spans(length), strict=True))
        for head, (one, other) in enumerate(zip(*rows, strict=True))
    ]
    changes = [list(pair) for pair in pairs if pair[2] != pair[3]]
    layers = [sum(change[0] == layer for change in changes) for layer in range(len(a.rules))]
    return {
        "heads": len(pairs),
        "differ": len(changes),
        "longer": sum(change[3] > change[2] for change in changes),
        "shorter": sum(change[3] < change[2] for change in changes),
        "layers": layers,
        "changes": changes,
    }


def _widths(a: Plan, b: Plan) -> list[list[int | None]]:
    return [
        [layer, head, one.bits, other.bits]
        for layer, rows in enumerate(zip(a.rules, b.rules, strict=True))
        for head, (one, other) in enumerate(zip(*rows, strict=True))
        if one.bits != other.bits
    ]


def _pair(a: float | None, b: float | None) -> dict[str, float | None]:
    return {"a": a, "b": b, "change": None if a is None or b is None else b - a}


def _bytes(side: Side, length: int) -> int | None:
    """KV bytes held of one sequence, as far as the side tells."""
    return None if side.kv is None else side.plan.held_bytes(length, side.kv)


def _comparable(a: Side, b: Side) -> bool:
    """Equal samples and model give the dense model the same losses at the same length."""
    one, other = a.losses.get("dense"), b.losses.get("dense")
    if one is None or other is None or a.unseen != b.unseen or one.keys() != other.keys():
        return False
    return all(abs(one[domain] - other[domain]) <= _SAME_LOSS for domain in one)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Facts that both tell and that differ, and those of one side alone where it is a package."""
    return [
        {"name": name, "a": a.get(name), "b": b.get(name)}
        for name in _names(a, b)
        if a.get(name) != b.get(name)
    ]


def _names(a: Mapping[str, Any], b: Mapping[str, Any]) -> Sequence[str]:
    """In the order of the one that tells more; between a plan and a package, what both tell."""
    if ("dtype" in a) != ("dtype" in b):
        return [name for name in a if name in b]
    return list(dict.fromkeys([*a, *b]))
