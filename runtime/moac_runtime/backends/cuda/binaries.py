"""The kernels that a package holds, by their launch metadata, and which of them a device runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from moac_runtime.errors import ArtifactError, MoacError
from moac_runtime.host.extras import install
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.integrity import REMEDY
from moac_runtime.package.manifest import read_json

Form = Literal["cubin", "ptx", "source"]
T = TypeVar("T")

_PORTABLE = "compute_"  # how folders of PTX begin; those of machine code begin with sm_


@dataclass(frozen=True, slots=True)
class Binary:
    """A kernel built for one architecture: what `kernels/<arch>/<name>.json` says of it.

    `entry`: its function in the binary or source. `arguments`: names in order; after them come
    `null_arguments` null pointers. `constants`: compiled in; they size the grid. `shared`: bytes
    of dynamic shared memory. `driver`: the lowest `cuDriverGetVersion` that loads it.
    """

    name: str
    arch: str
    entry: str
    source: str
    arguments: tuple[str, ...]
    null_arguments: int
    constants: Mapping[str, int]
    num_warps: int
    num_stages: int
    max_registers: int | None
    shared: int
    cubin: str | None
    ptx: str
    driver: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Binary:
        """Raises KeyError or TypeError where a field is missing or of the wrong kind."""
        values = {field.name: data[field.name] for field in fields(cls)}
        values["arguments"] = tuple(name for name, _ in data["arguments"])
        return cls(**values)

    def taken(self, given: Mapping[str, T]) -> list[T]:
        """What the kernel takes of `given`, in its order. Raises ValueError where some lacks."""
        if lacking := [name for name in self.arguments if name not in given]:
            raise ValueError(f"{self.name} takes {', '.join(lacking)} too, which is not given")
        return [given[name] for name in self.arguments]


Binaries = Mapping[str, Mapping[str, Binary]]
"""`[arch][name]`; architectures are `sm_90` for machine code and `compute_80` for PTX."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernels to run, all of one form. `arch`: what they were built for."""

    form: Form
    arch: str
    kernels: Mapping[str, Binary]


def read_binaries(artifact: Artifact) -> Binaries:
    """Launch metadata of every kernel in the package. Raises ArtifactError where it is damaged."""
    found: dict[str, dict[str, Binary]] = {}
    for path in sorted(artifact.files):
        parts = Path(path).parts
        if parts[0] == "kernels" and len(parts) == 3 and path.endswith(".json"):
            try:
                binary = Binary.from_json(read_json(artifact.path(path), path))
            except (KeyError, TypeError, ValueError) as error:
                raise ArtifactError(f"{path} describes no kernel ({error!r}): {REMEDY}") from error
            found.setdefault(binary.arch, {})[binary.name] = binary
    return found


def read_folder(root: Path) -> Binaries:
    """The same of kernels in `root/kernels`, in no package."""
    found: dict[str, dict[str, Binary]] = {}
    for path in sorted((root / "kernels").glob("*/*.json")):
        binary = Binary.from_json(json.loads(path.read_text(encoding="utf-8")))
        found.setdefault(binary.arch, {})[binary.name] = binary
    return found


def choose(
    binaries: Binaries, *, capability: tuple[int, int], driver: int | None, triton: bool
) -> Choice:
    """Machine code for this very architecture, else PTX, else the source.

    `driver`: `cuDriverGetVersion`, None where nothing is there to call the driver with. `triton`:
    whether it can build the source here. Raises MoacError, one sentence, where nothing of it can
    run.
    """
    arch = f"sm_{capability[0]}{capability[1]}"
    portable = _portable(binaries, capability)
    if portable is None:
        raise MoacError(
            f"the package has no kernels for this GPU, whose architecture is {arch}: they are for "
            f"{_listed(binaries)}; run on another backend, or compile the package for the GPU"
        )
    forms: list[tuple[Form, str]] = [("cubin", arch)] if arch in binaries else []
    forms.append(("ptx", portable))
    for form, name in forms:
        if driver is not None and driver >= _lowest_driver(binaries[name]):
            return Choice(form, name, binaries[name])
    if triton:
        return Choice("source", portable, binaries[portable])
    if driver is None:
        raise MoacError(
            "launching the package's kernels needs cuda-bindings, which is not installed; "
            f"run: {install('cuda')}"
        )
    raise MoacError(
        f"the NVIDIA driver serves CUDA up to {version(driver)}, but the package's kernels for "
        f"{arch} need {version(_lowest_driver(binaries[portable]))}; update the driver, or "
        "install triton, a C compiler and Python's headers to build them here"
    )


def version(driver: int) -> str:
    """`cuDriverGetVersion` as people write it: 12080 is 12.8."""
    return f"{driver // 1000}.{driver % 1000 // 10}"


def _portable(binaries: Binaries, capability: tuple[int, int]) -> str | None:
    """The newest PTX that the architecture can run."""
    able = 10 * capability[0] + capability[1]
    numbers = [int(a.removeprefix(_PORTABLE)) for a in binaries if a.startswith(_PORTABLE)]
    return max((f"{_PORTABLE}{n}" for n in numbers if n <= able), default=None)


def _listed(binaries: Binaries) -> str:
    archs = sorted((a for a in binaries if not a.startswith(_PORTABLE)), key=lambda a: int(a[3:]))
    later = [f"sm_{a.removeprefix(_PORTABLE)} and later" for a in binaries if a not in archs]
    return ", ".join([*archs, *later])


def _lowest_driver(kernels: Mapping[str, Binary]) -> int:
    return max(kernel.driver for kernel in kernels.values())
