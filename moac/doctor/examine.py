"""Everything that can be found out about this machine, and what a package would run with."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from moac.doctor import backends, machine
from moac.doctor.libraries import installed, libraries


def examine(package: Path | None = None) -> dict[str, Any]:
    """All that `moac doctor` tells, as JSON has it. Raises ArtifactError for a damaged package."""
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
