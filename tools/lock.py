"""Write a constraints file: an exact version of everything that the project's extras bring.

    python tools/lock.py torch==2.13.0 constraints.txt
    python tools/lock.py torch==2.13.0 constraints-oldest.txt --oldest

pip chooses the newest versions that pyproject.toml allows, or the lowest of what it names
(--oldest) and the newest of what that brings. torch is the given one: plain `torch` would bring
gigabytes of CUDA packages. Run it in an environment that has pip; nothing is installed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OWN = "moac"
EXTRAS = "dev,eval,cuda,ray"
_RANGE = re.compile(r"(?P<name>[\w.-]+)(?:\[[\w,-]+\])?>=(?P<lowest>[\w.]+),<(?P<above>[\w.]+)")


def requirements(project: dict[str, Any]) -> Iterator[str]:
    """What pyproject.toml names with a version, the build's needs last."""
    yield from project["project"]["dependencies"]
    for extra in project["project"]["optional-dependencies"].values():
        yield from (line for line in extra if not line.startswith(f"{OWN}["))
    yield from project["build-system"]["requires"]


def lowest(requirement: str) -> tuple[str, str]:
    """The name in `requirement` and its lowest version. Raises ValueError without both bounds."""
    found = _RANGE.match(requirement)
    if found is None:
        raise ValueError(f"{requirement!r} must read NAME>=LOWEST,<ABOVE, as the others do")
    return found["name"].lower(), found["lowest"]


def resolve(constraints: list[str], wanted: list[str]) -> dict[str, str]:
    """What pip would install for this project with every extra and `wanted`, by name."""
    with tempfile.TemporaryDirectory() as folder:
        given, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        given.write_text("\n".join(constraints) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "--constraint", str(given)]
        subprocess.run([*command, f".[{EXTRAS}]", *wanted], cwd=ROOT, check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return dict(sorted(_pin(entry["metadata"]) for entry in found))


def _pin(metadata: dict[str, str]) -> tuple[str, str]:
    # a local version such as +cpu is that of one index
    name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
    return name, metadata["version"].partition("+")[0]


def render(pins: dict[str, str], named: set[str], heading: str) -> str:
    """The file's text: what is `named` first, then what it brings."""
    lines = [f"# {heading} Made by `make lock`.", "", "# named in pyproject.toml"]
    lines += [f"{name}=={pins[name]}" for name in pins if name in named]
    lines += ["", "# what those bring"]
    lines += [f"{name}=={pins[name]}" for name in pins if name not in named | {OWN}]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Resolve and write."""
    parser = argparse.ArgumentParser(description="Write a constraints file.")
    parser.add_argument("torch", metavar="torch==VERSION")
    parser.add_argument("target", type=Path)
    parser.add_argument("--oldest", action="store_true")
    options = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    bounds = dict(lowest(line) for line in requirements(project)) | {"torch": ""}
    fixed = [f"{name}=={version}" for name, version in bounds.items() if version]
    pins = resolve(
        [options.torch, *(fixed if options.oldest else [])], project["build-system"]["requires"]
    )
    heading = (
        "The oldest versions that the project is tested with; torch stays, for want of an older "
        "CPU build."
        if options.oldest
        else "The versions this project is built and tested with. Used by README, Makefile and CI."
    )
    options.target.write_text(render(pins, set(bounds), heading), encoding="utf-8")


if __name__ == "__main__":
    main()
