"""`plan.json` alone: what `moac plan` writes and `moac compile --plan` takes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moac.checkpoint import Checkpoint
from moac.lengths import Lengths
from moac.origin import told_model
from moac.pipeline.cap import KvCap, kv_shape, told_bytes
from moac.planning import HeadLayout
from moac.request import CompileRequest
from moac.store.rename import move_new
from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.host.files import read_regular
from moac_runtime.package.json_text import MOST_BYTES, parse_json
from moac_runtime.package.kv_format import KV_BITS, KvShape
from moac_runtime.package.limits import MOST_CONTEXT
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec

SHAPE = ("family", "num_layers", "num_kv_heads", "head_dim")
"""What of a model's spec a plan must fit, whichever model of that shape it was made for."""

_SEAL = "sha256"
_CAP = ("max_bytes", "batch", "length", "token_bytes")
_REMEDY = "give a plan.json that `moac plan` or `moac compile` wrote"


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A plan read back. `record`: how it was found; `sha256`: of the whole file; `edited`:
    whether its rules are others than those that were written; `known`: whether moac brings it.
    """

    path: Path
    plan: Plan
    record: dict[str, Any]
    sha256: str
    edited: bool
    known: bool = False

    def prepared(self, upto: int, kv: KvShape | None = None) -> tuple[Lengths, HeadLayout]:
        """The lengths and the layout that the plan was made for; `upto`: the longest session.

        `kv`: a key of the package, for the bytes of a plan with widths.
        """
        record = self.record
        lengths = Lengths(
            profiled=tuple(record["lengths"]),
            extrapolated=record.get("extrapolated"),
            unseen=record["unseen"],
            upto=upto,
            capped=record.get("kv_cap", {}).get("length"),
        )
        return lengths, HeadLayout.of(self.plan, kv if self.plan.rounds else None)


def check_plan_target(path: Path, *, force: bool) -> None:
    """Refuse, before any work, a file that could not be written in the end. Raises UsageError."""
    if "\0" in str(path):
        raise UsageError(f"{str(path)!r} holds a NUL, which no name does: choose another name")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected a file to write: choose another name")
    if path.exists() and not force:
        raise UsageError(
            f"{path} already exists: pass --force to replace it, or choose another name"
        )
    parent = path.resolve().parent
    if not parent.is_dir():
        raise UsageError(f"there is no folder {parent} to write {path.name} in: make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{parent} is not writable: choose another folder")


def refuse_beside_plan(names: Sequence[str]) -> None:
    """Raise UsageError where `names` (fields of a request) decide what a plan has decided."""
    if names:
        option = f"--{names[0].replace('_', '-')}"
        raise UsageError(
            f"--plan brings its own plan and {option} asks for another; leave {option} out, or "
            "leave --plan out to plan anew"
        )


def made_for(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a plan belongs to: the model by its identity, and the shape of its heads."""
    spec = checkpoint.spec
    return {
        "source": checkpoint.name,
        "revision": checkpoint.revision,
        "identity": checkpoint.identity,
        **{name: getattr(spec, name) for name in SHAPE},
    }


def sealed(plan: Plan, record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with the digests that tell later what was edited: the rules, or the rest."""
    return {**record, _SEAL: _seal({**record, **plan.to_json()})}


def _seal(data: Mapping[str, Any]) -> dict[str, str]:
    rest = {name: value for name, value in data.items() if name not in ("rules", _SEAL)}
    return {"rules": _digest(data["rules"]), "rest": _digest(rest)}


def _digest(value: Any) -> str:
    # Numbers as floats: an editor may well write 1.0 as 1.
    same = json.loads(json.dumps(value), parse_int=float)
    text = json.dumps(same, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_plan_file(path: Path, plan: Plan, record: Mapping[str, Any], *, force: bool) -> None:
    """Write the plan and its sealed record, whole or not at all. Raises UsageError, MoacError."""
    check_plan_target(path, force=force)
    text = json.dumps({**record, **plan.to_json()}, indent=2, sort_keys=True, allow_nan=False)
    try:
        _publish(path, f"{text}\n".encode(), force=force)
    except FileExistsError:
        check_plan_target(path, force=force)
        raise
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise MoacError(
            f"{path} could not be written ({reason}) and is as it was: free some space or choose "
            "another folder"
        ) from error


def _publish(path: Path, data: bytes, *, force: bool) -> None:
    handle, name = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.")
    staging = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        staging.chmod(0o666 & ~mask)
        if force:
            staging.replace(path)
        else:
            move_new(staging, path.resolve())
    finally:
        staging.unlink(missing_ok=True)


def read_plan_file(path: Path, checkpoint: Checkpoint, request: CompileRequest) -> PlanFile:
    """The plan at `path`, which must have been made for `checkpoint`.

    Rules may have been edited by hand: every one is checked. Raises UsageError for a plan of
    another model or a request that plans for itself, ArtifactError for a file without a plan.
    """
    refuse_beside_plan(request.planning_given())
    data, digest = _read(path)
    _check_identity(path, data, checkpoint)
    edited = _edited(path, data)
    plan = _checked_plan(path, data, checkpoint.spec)
    record = {name: value for name, value in data.items() if name not in plan.to_json()}
    _check_record(path, record)
    return PlanFile(path, plan, _with_cap(path, record, plan, checkpoint, request), digest, edited)


def read_rules(path: Path, checkpoint: Checkpoint) -> Plan:
    """The plan at `path` for `checkpoint`, however it was found; raises as `read_plan_file`."""
    data, _ = _read(path)
    _check_identity(path, data, checkpoint)
    _edited(path, data)
    return _checked_plan(path, data, checkpoint.spec)


def read_plan_of_shape(path: Path, spec: ModelSpec, source: str) -> tuple[Plan, dict[str, Any]]:
    """The plan at `path` and the model that it was made for, which is of the shape of `spec`.

    `source` names the one at hand; whether it is that model, the caller has to ask. Rules may have
    been edited by hand: every one is checked. Raises UsageError for a plan of another shape,
    ArtifactError for a file without a plan.
    """
    data, _ = _read(path)
    made = _check_shape(path, data, spec, source)
    _edited(path, data)
    return _checked_plan(path, data, spec), made


def read_untouched(path: Path) -> dict[str, Any]:
    """What the plan at `path` holds, rules and record, exactly as it was written.

    Raises ArtifactError for a file without a plan and for one that was changed anywhere.
    """
    data, _ = _read(path)
    if _edited(path, data):
        raise ArtifactError(
            f"the rules of {path} were edited after it was written, expected them as they were "
            "measured: undo that, or write the plan again with `moac plan`"
        )
    try:
        Plan.from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} holds no usable plan ({_said(error)}): {_REMEDY}") from error
    return data


def _check_record(path: Path, record: Mapping[str, Any]) -> None:
    """Raises ArtifactError where the record does not hold what a package is made from."""
    lengths = record.get("lengths")
    right = {
        "lengths": isinstance(lengths, list) and bool(lengths) and all(map(_is_length, lengths)),
        "extrapolated": record.get("extrapolated") is None or _is_length(record["extrapolated"]),
        "unseen": _is_length(record.get("unseen")),
        "budget": type(record.get("budget")) in (int, float),
        "kv_cap": "kv_cap" not in record or _is_cap(record["kv_cap"]),
    }
    wrong = next((name for name, holds in right.items() if not holds), None)
    if wrong is not None:
        raise ArtifactError(
            f"{path} holds {wrong} = {record.get(wrong)!r:.60}, which is none of a plan: {_REMEDY}"
        )


def _is_length(found: object) -> bool:
    return type(found) is int and 1 <= found <= MOST_CONTEXT


def _is_cap(found: object) -> bool:
    if not isinstance(found, dict):
        return False
    return all(type(found.get(name)) is int and 1 <= found[name] < 2**63 for name in _CAP)


def _with_cap(
    path: Path,
    record: dict[str, Any],
    plan: Plan,
    checkpoint: Checkpoint,
    request: CompileRequest,
) -> dict[str, Any]:
    """The record, its cap on KV bytes counted again: for edited rules and the package's dtype.

    Raises UsageError where the plan passes the cap.
    """
    if "kv_cap" not in record:
        return record
    made = record["kv_cap"]
    cap = KvCap(made["max_bytes"], made["batch"], made["length"], kv_shape(checkpoint, request))
    if cap.held_bytes(plan) > cap.max_bytes:
        edited = cap.kv.token_bytes() == made["token_bytes"]
        raise UsageError(
            f"{path} was planned for at most {told_bytes(cap.max_bytes)} of KV memory, and "
            f"{'edited' if edited else 'in this dtype'} it holds "
            f"{told_bytes(cap.held_bytes(plan))}; plan anew with `moac plan --max-kv-bytes`"
        )
    return {**record, "kv_cap": cap.record(plan)}


def _read(path: Path) -> tuple[dict[str, Any], str]:
    try:
        raw = read_regular(path, MOST_BYTES)
        data = parse_json(raw)
    except OSError as error:
        raise ArtifactError(
            f"the plan {path} cannot be read ({error.strerror}): {_REMEDY}"
        ) from error
    except ValueError as error:
        raise ArtifactError(f"the plan {path} is not JSON ({error}): {_REMEDY}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds no JSON object, expected a plan: {_REMEDY}")
    return data, hashlib.sha256(raw).hexdigest()


def _check_shape(
    path: Path, data: Mapping[str, Any], spec: ModelSpec, source: str
) -> dict[str, Any]:
    """What the plan says of its model, whose heads must be shaped as those of `spec`."""
    made = data.get("model")
    if not isinstance(made, dict):
        raise ArtifactError(f"{path} does not tell which model it was made for: {_REMEDY}")
    for name in SHAPE:
        if made.get(name) != getattr(spec, name):
            raise UsageError(
                f"{path} was made for a model with {name} {made.get(name)}, but {source} has "
                f"{getattr(spec, name)}; plan this model with `moac plan`"
            )
    return made


def _check_identity(path: Path, data: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    made = _check_shape(path, data, checkpoint.spec, checkpoint.source)
    ours = made_for(checkpoint)
    if "identity" not in made:
        raise UsageError(
            f"{path} was made by an older version of moac, which told models apart by other "
            "means; write the plan again with `moac plan`"
        )
    if made["identity"] != ours["identity"]:
        raise UsageError(
            f"{path} was made for {told_model(made)}, another model of this shape than "
            f"{checkpoint.source} (identity {ours['identity'][:16]}); plan this model with "
            "`moac plan`"
        )


def _edited(path: Path, data: Mapping[str, Any]) -> bool:
    """Whether the rules are others than were written; anything else must be as it was."""
    made = data.get(_SEAL)
    if not isinstance(made, dict) or "rules" not in data:
        missing = _SEAL if "rules" in data else "rules"
        raise ArtifactError(f"{path} holds no usable plan (it has no {missing!r}): {_REMEDY}")
    found = _seal(data)
    if found["rest"] != made.get("rest"):
        raise ArtifactError(
            f"{path} was changed beside its rules, which alone may be edited: undo that, or write "
            "the plan again with `moac plan`"
        )
    return found["rules"] != made.get("rules")


def _checked_plan(path: Path, data: Mapping[str, Any], spec: ModelSpec) -> Plan:
    """Raises ArtifactError for rules that a model of `spec` cannot run."""
    try:
        _check_rules(data["rules"], spec)
        return Plan.from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} holds no usable plan ({_said(error)}): {_REMEDY}") from error


def _check_rules(rules: Any, spec: ModelSpec) -> None:
    """Raises TypeError, ValueError."""
    if [len(layer) for layer in rules] != [spec.num_kv_heads] * spec.num_layers:
        raise ValueError(f"rules must be {spec.num_layers} layers of {spec.num_kv_heads} KV heads")
    for layer, row in enumerate(rules):
        for head, rule in enumerate(row):
            _check_rule(rule, f"layer {layer}, KV head {head}", spec.context)


def _check_rule(rule: Any, where: str, context: int) -> None:
    if not isinstance(rule, list) or len(rule) not in (2, 3):
        raise ValueError(
            f"the rule of {where} must be [alpha, beta] or [alpha, beta, bits], got {rule!r}"
        )
    alpha, beta, *bits = rule
    if bits and (type(bits[0]) is not int or bits[0] not in KV_BITS):
        raise ValueError(f"bits of {where} must be 8 or 4, or left out, got {bits[0]!r}")
    if type(alpha) is not int or abs(alpha) > context:
        raise ValueError(
            f"alpha of {where} must be a whole number of tokens within the context of {context}, "
            f"got {alpha!r}"
        )
    if type(beta) not in (int, float) or not 0 <= beta <= 1:
        raise ValueError(f"beta of {where} must be a number from 0 to 1, got {beta!r}")


def _said(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
