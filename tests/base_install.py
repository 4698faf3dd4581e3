"""A host with the base install alone: what `pip install moac` brings, and no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

import moac_kernels
import moac_runtime

ROOT = Path(__file__).parents[1]
_PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = _PYPROJECT["project"]
WHEEL = _PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
NAMED = [Requirement(line).name for line in PROJECT["dependencies"]]
LIBRARIES = (*NAMED, "markupsafe", "moac")  # what tokenizers brings beside is for its hub
MOAC = "from moac.cli.main import main; main()"


def sources() -> list[str]:
    """The folders that moac is imported from."""
    modules = (moac_runtime, moac_kernels)
    return [str(ROOT), *(str(Path(module.__file__ or "").parents[1]) for module in modules)]


def link_libraries(site: Path) -> None:
    """Have `site` hold the libraries of the base install, as links to those of this process."""
    for name in LIBRARIES:
        found = distribution(name)
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", ".")}
        for top in tops - {"__pycache__"}:
            if not top.endswith(".pth"):
                (site / top).symlink_to(str(found.locate_file(top)))


def python_on(
    site: Path, *words: object, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with `words` where nothing is installed but the libraries in `site`, and moac."""
    path = os.pathsep.join([str(site), *sources()])
    return subprocess.run(
        [sys.executable, "-S", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
