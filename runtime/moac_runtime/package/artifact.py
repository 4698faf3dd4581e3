"""A package opened: nothing of it is used before every listed file proved to be what it was.

This file imports no torch, so that a caller can start the check, import torch, then wait:

    opening = start_opening(path)
    import torch
    artifact = opening.result()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moac_runtime.errors import ArtifactError, UsageError
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.integrity import MANIFEST, REMEDY, FileRecord, IntegrityCheck, inside
from moac_runtime.package.kv_format import PLANNED, KvShape
from moac_runtime.package.manifest import Manifest, parse_manifest, read_json
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.weight_formats import described

PLAN = "plan.json"
WEIGHT_INDEX = "weights/model.safetensors.index.json"

CheckLevel = Literal["full", "sizes"]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A checked package. `capacity`: most tokens a session may hold.

    `dtype`: of norms, biases and computing; `weight_formats`: of each kind of matrix.
    `kv_format`: of keys and values, `dtype` or "planned".
    `head_order[layer][position]`: the checkpoint's KV head packed at that position. `plan` stays
    in checkpoint order. `files`: what the manifest lists, by path inside `root`.
    """

    root: Path
    spec: ModelSpec
    plan: Plan
    dtype: str
    kv_format: str
    weight_formats: Mapping[str, str]
    capacity: int
    head_order: tuple[tuple[int, ...], ...]
    targets: tuple[str, ...]
    provenance: Mapping[str, Any]
    verification: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    @property
    def kv(self) -> KvShape:
        """What a key of the package is, for counting bytes."""
        return self.spec.kv_shape(DTYPE_BYTES[self.dtype])

    @property
    def weights(self) -> str:
        """How matrices are stored: "full" (in `dtype`), "int8", "int4", or "mixed" by kinds."""
        return described(self.weight_formats)

    def path(self, name: str) -> Path:
        """The path of a listed file. Raises ArtifactError for one the manifest does not list."""
        if name not in self.files:
            raise ArtifactError(
                f"{self.root} has no {name} in its {MANIFEST}, expected it there: recompile it"
            )
        return self.root / name


class Opening:
    """A package whose files are being hashed in the background; `result` waits for the verdict."""

    def __init__(self, root: Path, manifest: Manifest, check: IntegrityCheck):
        self._root, self._manifest, self._check = root, manifest, check
        self._artifact: Artifact | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The backends the package is built for, known before its files are checked."""
        return self._manifest.targets

    @property
    def model(self) -> tuple[ModelSpec, str]:
        """The model and the package's dtype, known as early."""
        return self._manifest.model, self._manifest.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files of weights."""
        files = self._manifest.files
        return sum(files[name].size for name in files if name.startswith("weights/"))

    def cancel(self) -> None:
        """Give the check up: a process that ends would else wait for it."""
        self._check.cancel()

    def result(self) -> Artifact:
        """The checked package, the same one at every call. Raises ArtifactError."""
        if self._artifact is None:
            self._check.result()
            self._artifact = self._opened()
        return self._artifact

    def _opened(self) -> Artifact:
        manifest = self._manifest
        return Artifact(
            root=self._root,
            spec=manifest.model,
            plan=_read_plan(self._root, manifest),
            dtype=manifest.dtype,
            kv_format=manifest.kv_format,
            weight_formats=manifest.weight_formats,
            capacity=manifest.capacity,
            head_order=manifest.head_order,
            targets=manifest.targets,
            provenance=manifest.provenance,
            verification=manifest.verification,
            files=manifest.files,
        )


def start_opening(path: str | Path, *, check: CheckLevel = "full") -> Opening:
    """Check the manifest, and that its files are there in full; hash them in the background.

    `check="sizes"` hashes nothing. Raises ArtifactError, UsageError for another `check`.
    """
    if check not in get_args(CheckLevel):
        raise UsageError(f"check is {check!r}, expected one of {', '.join(get_args(CheckLevel))}")
    root = Path(path)
    manifest = parse_manifest(_read_manifest(root))
    for name in (PLAN, WEIGHT_INDEX):
        if name not in manifest.files:
            raise ArtifactError(f"{MANIFEST} does not list {name}, expected it there: {REMEDY}")
    return Opening(root, manifest, IntegrityCheck(root, manifest.files, hashes=check == "full"))


def open_artifact(path: str | Path, *, check: CheckLevel = "full") -> Artifact:
    """Open the package at `path`, checked. Raises ArtifactError, one sentence with the remedy."""
    return start_opening(path, check=check).result()


def load_plan_record(artifact: Artifact) -> dict[str, Any]:
    """The whole `plan.json`: the rules and how they were found."""
    return read_json(artifact.path(PLAN), PLAN)


def kv_format(plan: Plan, dtype: str) -> str:
    """What a manifest says of a plan's keys and values in a package of `dtype`."""
    return PLANNED if plan.rounds else dtype


def _read_manifest(root: Path) -> dict[str, Any]:
    if not root.exists():
        raise ArtifactError(f"{root} does not exist, expected a package: check the path")
    if not root.is_dir():
        raise ArtifactError(f"{root} is a file, expected a package folder: check the path")
    path = inside(root, MANIFEST)
    if not path.exists():
        raise ArtifactError(
            f"{root} holds no {MANIFEST}, expected a package: "
            "give the folder that `moac compile -o` wrote"
        )
    return read_json(path, MANIFEST)


def _read_plan(root: Path, manifest: Manifest) -> Plan:
    spec, data = manifest.model, read_json(root / PLAN, PLAN)
    try:
        plan = Plan.from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{PLAN} holds no plan ({error!r}): {REMEDY}") from error
    found = len(plan.rules), len(plan.rules[0])
    if found != (spec.num_layers, spec.num_kv_heads):
        raise ArtifactError(
            f"{PLAN} has rules for {found[0]} layers of {found[1]} KV heads, expected "
            f"{spec.num_layers} layers of {spec.num_kv_heads}: {REMEDY}"
        )
    if plan.windows != spec.windows:
        raise ArtifactError(
            f"{PLAN} has windows {list(plan.windows)}, expected the model's "
            f"{list(spec.windows)}: {REMEDY}"
        )
    expected = kv_format(plan, manifest.dtype)
    if expected != manifest.kv_format:
        raise ArtifactError(
            f"{MANIFEST} has kv_format = {manifest.kv_format!r}, and the rules of {PLAN} are "
            f"{expected!r}: {REMEDY}"
        )
    return plan
