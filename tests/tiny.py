"""Compiles small enough for tests: short lengths, small spans, one sample of each domain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import moac.cli.main
from moac import CompileRequest
from moac_runtime.package.integrity import MANIFEST, hash_files, package_files
from moac_runtime.package.manifest import manifest_digest
from moac_runtime.package.signature import SIGNATURE
from moac_runtime.package.trust import trust

CONTEXT = 2048
LENGTHS = (512, 768)
_CHOICES: dict[str, Any] = {"sink": 16, "block": 16, "min_span": 32, "plans": 2, "samples": 1}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A tiny checkpoint, the package made from it, and the work folder with every stage."""

    checkpoint: Path
    package: Path
    work_dir: Path


def request(**changes: Any) -> CompileRequest:
    """What a tiny compile asks for; `changes` are fields of the request."""
    # no native kernels: building them takes longer than everything else
    return CompileRequest(**{"lengths": LENGTHS, "targets": ("torch",), **_CHOICES, **changes})


def options(**changes: Any) -> list[str]:
    """The same for `moac compile`."""
    return [*plan_options(**changes), "--target", "torch"]


def plan_options(**changes: Any) -> list[str]:
    """The same for `moac plan`, which knows no targets."""
    asked = asdict(request(**changes))
    chosen = {name: asked[name] for name in (*_CHOICES, *changes) if name != "lengths"}
    lengths = ",".join(map(str, asked["lengths"]))
    words = ["--lengths", lengths]
    for name, value in chosen.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def built_for(package: Path, targets: Sequence[str], copy: Path) -> Path:
    """A copy of `package` whose manifest says that it is built for `targets`; it is trusted."""
    shutil.copytree(package, copy)
    trust(resealed(copy, targets=list(targets)), "a test")
    return copy


def resealed(package: Path, **changes: Any) -> str:
    """Have a package's manifest list what stands in its folder, with `changes`; its new digest.

    Nobody recorded that one: it is a stranger's package.
    """
    path = package / MANIFEST
    names = [name for name in package_files(package) if name not in (MANIFEST, SIGNATURE)]
    files = {name: asdict(record) for name, record in hash_files(package, names).items()}
    manifest = json.loads(path.read_text(encoding="utf-8")) | {"files": files, **changes}
    manifest["digest"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return str(manifest["digest"])


def stranger(package: Path, copy: Path) -> Path:
    """A copy of `package` that is whole, and that nobody here compiled or ran."""
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    provenance = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))["provenance"]
    resealed(copy, provenance={**provenance, "source": "a stranger"})
    return copy


def moac_command(*arguments: object) -> int:
    """Run `moac ARGUMENTS` in this process and return its exit code."""
    try:
        moac.cli.main.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
