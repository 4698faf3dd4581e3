"""`moac doctor`."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import click


@click.command("doctor")
@click.argument("package", required=False, type=click.Path(path_type=Path, readable=False))
@click.option("--json", "as_json", is_flag=True, help="everything as JSON")
def doctor_command(package: Path | None, as_json: bool) -> None:
    """Tell what this machine has and lacks, and what PACKAGE would run with here, and why."""
    from moac.doctor.text import doctor_text

    found = examine(package)
    click.echo(json.dumps(found, indent=2) if as_json else doctor_text(found))


def examine(package: Path | None = None) -> dict[str, Any]:
    """Everything the command tells, as JSON has it. Raises ArtifactError for a damaged package."""
    from moac.doctor import backends, machine
    from moac.doctor.libraries import installed, libraries

    found = {
        "moac": installed("moac"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": machine.processor(),
        "cores": machine.cores(),
        "memory": machine.memory(),
        "compiler": machine.compiler(),
        "work_folder": machine.work_folder(),
        "backends": backends.backends(),
        "libraries": {library.name: library.to_json() for library in libraries()},
    }
    return found if package is None else {**found, "package": backends.package_backends(package)}
