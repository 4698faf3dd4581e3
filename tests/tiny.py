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
from moac_runtime.package.manifest import manifest_digest

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
    """A copy of `package` whose manifest says that it is built for `targets`."""
    shutil.copytree(package, copy)
    manifest = json.loads((copy / "moac.json").read_text()) | {"targets": list(targets)}
    manifest["digest"] = manifest_digest(manifest)
    (copy / "moac.json").write_text(json.dumps(manifest))
    return copy


def moac_command(*arguments: object) -> int:
    """Run `moac ARGUMENTS` in this process and return its exit code."""
    try:
        moac.cli.main.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
