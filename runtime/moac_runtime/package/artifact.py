"""A package opened: nothing of it is used before every listed file proved to be what it was.

This file imports no torch, so that a caller can start the check, import torch, then wait:

    opening = start_opening(path)
    import torch
    artifact = opening.result()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moac_runtime.errors import ArtifactError, CheckFailed, UsageError
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.held import HeldFiles
from moac_runtime.package.integrity import (
    CODE,
    MANIFEST,
    REMEDY,
    FileRecord,
    IntegrityCheck,
    inside,
    unreadable,
)
from moac_runtime.package.json_text import MOST_BYTES
from moac_runtime.package.kv_format import PLANNED, KvShape
from moac_runtime.package.manifest import Manifest, json_object, parse_manifest
from moac_runtime.package.plan import Plan
from moac_runtime.package.signature import check_signature
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.trust import harmless_targets, is_trusted
from moac_runtime.package.weight_formats import described

PLAN = "plan.json"
WEIGHT_INDEX = "weights/model.safetensors.index.json"

CheckLevel = Literal["full", "sizes"]
_HASHED: dict[CheckLevel, tuple[str, ...]] = {"full": ("",), "sizes": CODE}
_JSON_BYTES = MOST_BYTES + 1  # so that a longer text is told from the longest
_TRIES = 5  # at a package that is exchanged while it is being opened


@dataclass(frozen=True, slots=True)
class Artifact:
    """A checked package. `capacity`: most tokens a session may hold.

    `dtype`: of norms, biases and computing; `weight_formats`: of each kind of matrix.
    `kv_format`: of keys and values, `dtype` or "planned".
    `head_order[layer][position]`: the checkpoint's KV head packed at that position. `plan` stays
    in checkpoint order. `files`: what the manifest lists, by path inside `root`. `digest` names
    the package. `trusted`: whether code of its own may run here. Its files are open as long as
    this object is there, and are read through it alone.
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
    digest: str
    trusted: bool
    held: HeldFiles

    @property
    def runs(self) -> tuple[str, ...]:
        """The targets that may run here: without trust those alone that hold no code."""
        return self.targets if self.trusted else harmless_targets(self.targets)

    @property
    def kv(self) -> KvShape:
        """What a key of the package is, for counting bytes."""
        return self.spec.kv_shape(DTYPE_BYTES[self.dtype])

    @property
    def weights(self) -> str:
        """How matrices are stored: "full" (in `dtype`), "int8", "int4", or "mixed" by kinds."""
        return described(self.weight_formats)

    def read(self, name: str) -> bytes:
        """The bytes of a listed file. Raises ArtifactError for one the manifest does not list."""
        self._require(name)
        return self.held.read(name)

    def open(self, name: str) -> AbstractContextManager[int]:
        """A descriptor of a listed file, good inside the block. Raises ArtifactError."""
        self._require(name)
        return self.held.opened(name)

    def json(self, name: str) -> dict[str, Any]:
        """The object in a listed JSON file. Raises ArtifactError."""
        self._require(name)
        return json_object(self.held.read(name, _JSON_BYTES), name)

    def path(self, name: str) -> Path:
        """A path of the listed file that was checked, as long as this object is there.

        It leads to the open file, whatever stands under its name by now. Raises ArtifactError for
        one the manifest does not list.
        """
        self._require(name)
        return self.held.path(name)

    def _require(self, name: str) -> None:
        if name not in self.files:
            raise ArtifactError(
                f"{self.root} has no {name} in its {MANIFEST}, expected it there: recompile it"
            )


class Opening:
    """A package whose files are being hashed in the background; `result` waits for the verdict."""

    def __init__(
        self,
        held: HeldFiles,
        manifest: Manifest,
        check: IntegrityCheck,
        *,
        trusted: bool,
        signed: bool,
    ):
        self._held, self._manifest, self._check = held, manifest, check
        self._artifact: Artifact | None = None
        self._signed = signed
        self.trusted = trusted
        """Whether code of the package may run here, once its files are checked."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The backends the package is built for, known before its files are checked."""
        return self._manifest.targets

    @property
    def runs(self) -> tuple[str, ...]:
        """See `Artifact`, known as early."""
        return self.targets if self.trusted else harmless_targets(self.targets)

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
        """The checked package, the same one at every call.

        Raises ArtifactError; of a package whose signature is asked for, CheckFailed.
        """
        if self._artifact is None:
            with _held_to_signature(self._signed):
                self._check.result()
                self._artifact = self._opened()
        return self._artifact

    def _opened(self) -> Artifact:
        manifest = self._manifest
        return Artifact(
            root=self._held.root,
            spec=manifest.model,
            plan=_parse_plan(self._held.read(PLAN, _JSON_BYTES), manifest),
            dtype=manifest.dtype,
            kv_format=manifest.kv_format,
            weight_formats=manifest.weight_formats,
            capacity=manifest.capacity,
            head_order=manifest.head_order,
            targets=manifest.targets,
            provenance=manifest.provenance,
            verification=manifest.verification,
            files=manifest.files,
            digest=manifest.digest,
            trusted=self.trusted,
            held=self._held,
        )


def start_opening(
    path: str | Path,
    *,
    check: CheckLevel = "full",
    trust: bool = False,
    signed_by: Path | None = None,
) -> Opening:
    """Check the manifest, and that its files are there in full; hash them in the background.

    `check="sizes"` hashes code alone. `trust`: whether the package's code may run here though this
    user did not record it. `signed_by`: a public key; the package must be signed by it, and is
    trusted then. Every file is opened here, once. Raises ArtifactError, CheckFailed where the
    package is not the one that was signed, and UsageError for another `check` or a key that is
    none.
    """
    if check not in get_args(CheckLevel):
        raise UsageError(f"check is {check!r}, expected one of {', '.join(get_args(CheckLevel))}")
    root = Path(path)
    for tries in range(1, _TRIES + 1):
        held = _hold(root)
        try:
            with _held_to_signature(signed_by is not None):
                return _start(held, check, trust, signed_by)
        except (ArtifactError, CheckFailed):
            if tries == _TRIES or not held.replaced():
                raise
    raise AssertionError("the last try returns or raises")


@contextmanager
def _held_to_signature(signed: bool) -> Iterator[None]:
    """Make damage a failed check where the package was to be the one that was signed."""
    try:
        yield
    except ArtifactError as error:
        if signed:
            raise CheckFailed(str(error)) from error
        raise


def _start(held: HeldFiles, check: CheckLevel, trust: bool, signed_by: Path | None) -> Opening:
    manifest = parse_manifest(_read_manifest(held))
    for name in (PLAN, WEIGHT_INDEX):
        if name not in manifest.files:
            raise ArtifactError(f"{MANIFEST} does not list {name}, expected it there: {REMEDY}")
    if signed_by is not None:
        check_signature(held, manifest.files, signed_by)
    found = IntegrityCheck(held, manifest.files, hashed=_HASHED[check])
    signed = signed_by is not None
    trusted = trust or signed or is_trusted(manifest.digest)
    return Opening(held, manifest, found, trusted=trusted, signed=signed)


def open_artifact(
    path: str | Path,
    *,
    check: CheckLevel = "full",
    trust: bool = False,
    signed_by: Path | None = None,
) -> Artifact:
    """Open the package at `path`, checked. Keywords, and what is raised, as of `start_opening`."""
    return start_opening(path, check=check, trust=trust, signed_by=signed_by).result()


def load_plan_record(artifact: Artifact) -> dict[str, Any]:
    """The whole `plan.json`: the rules and how they were found."""
    return artifact.json(PLAN)


def kv_format(plan: Plan, dtype: str) -> str:
    """What a manifest says of a plan's keys and values in a package of `dtype`."""
    return PLANNED if plan.rounds else dtype


def _hold(root: Path) -> HeldFiles:
    """The folder of a package, open."""
    if not root.exists():
        raise ArtifactError(f"{root} does not exist, expected a package: check the path")
    if not root.is_dir():
        raise ArtifactError(f"{root} is a file, expected a package folder: check the path")
    if not inside(root, MANIFEST).exists():
        raise ArtifactError(
            f"{root} holds no {MANIFEST}, expected a package: "
            "give the folder that `moac compile -o` wrote"
        )
    try:
        return HeldFiles(root)
    except OSError as error:
        raise unreadable(root, error) from error


def _read_manifest(held: HeldFiles) -> dict[str, Any]:
    try:
        held.hold([MANIFEST])
        return json_object(held.read(MANIFEST, _JSON_BYTES), MANIFEST)
    except OSError as error:
        raise unreadable(held.root / MANIFEST, error) from error


def _parse_plan(content: bytes, manifest: Manifest) -> Plan:
    spec, data = manifest.model, json_object(content, PLAN)
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
