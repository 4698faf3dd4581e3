"""Plans and packages that benchmarks compare, each made by a moac command in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from told import origin

from moac.checkpoint import Checkpoint
from moac.pipeline.plan_file import made_for, sealed, write_plan_file
from moac.planning import HeadLayout, uniform_plan
from moac.store.atomic import write_whole
from moac.store.kept import RESULTS, parse_name
from moac_runtime.errors import MoacError
from moac_runtime.host.process import INTERRUPTED
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.plan import Plan

UNIFORM = "uniform"

_MOAC = (sys.executable, "-c", "from moac.cli.main import main; main()")


def run_moac(arguments: Sequence[str]) -> dict[str, Any]:
    """What `moac ARGUMENTS --json` prints, in a fresh process, whose peak memory is its own.

    Raises MoacError where it fails, which it has told on stderr.
    """
    done = subprocess.run([*_MOAC, *arguments, "--json"], stdout=subprocess.PIPE, check=False)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        raise MoacError(
            f"moac {arguments[0]} failed (exit code {done.returncode}): mend what it says above "
            "and run the same command again"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def plan_path(work_dir: Path, budget: float, name: str) -> Path:
    """Where the plan of an effort, or the uniform one, stands."""
    return work_dir / f"{budget:g}" / f"{name}.json"


def kept_dir(work_dir: Path, effort: str) -> Path:
    """The work folder of an effort: its own, so that its first plan takes what it takes alone."""
    return work_dir / f"kept-{effort}"


def package_path(work_dir: Path, effort: str) -> Path:
    """Where the package stands on whose weights plans are compared."""
    return work_dir / f"package-{effort}"


def made_plan(
    model: str, effort: str, budget: float, *, work_dir: Path, planning: Sequence[str]
) -> dict[str, Any]:
    """Make the plan, unless it stands there, and tell what that took.

    `planning`: more options of `moac plan`. Returns `effort`, `budget`, `seconds` in all,
    `stages` with the seconds of each, `peak_memory_bytes`, `density`, `kept` (results of each
    kind that came from the work folder, and those that were made) and where it was made.
    """
    path, folder = plan_path(work_dir, budget, effort), kept_dir(work_dir, effort)
    arguments = ["plan", model, "--effort", effort, "--budget", f"{budget:g}", *planning]
    told = path.with_suffix(".made")
    if path.exists() and told.exists():
        known: dict[str, Any] = json.loads(told.read_bytes())
        if known["arguments"] == arguments:
            return known
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _results(folder)
    places = ["--work-dir", str(folder), "--output", str(path), "--force"]
    done = run_moac([*arguments, *places])
    record = done["record"]
    made = {
        "effort": effort,
        "budget": budget,
        "arguments": arguments,
        "seconds": round(done["seconds"], 1),
        "stages": {name: stage["seconds"] for name, stage in done["stages"].items()},
        "peak_memory_bytes": done["peak_memory_bytes"],
        "density": record["density"],
        "kept": _kept(before, _results(folder)),
        **origin(),
    }
    write_whole(told, json.dumps(made, indent=1).encode())
    return made


def made_uniform(
    checkpoint: Checkpoint, like: Plan, budget: float, path: Path, *, lengths: Sequence[int]
) -> Path:
    """Write the plan file of equal spans that fill `budget` at each of `lengths`.

    `like`: a plan of the same sink, block and smallest span.
    """
    plan = uniform_plan(HeadLayout.of(like), budget=budget, lengths=lengths)
    record = sealed(plan, {"model": made_for(checkpoint), "budget": budget})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_plan_file(path, plan, record, force=True)
    return path


def made_package(
    model: str, effort: str, budget: float, *, work_dir: Path, packaging: Sequence[str]
) -> Path:
    """Package the plan of an effort at a budget, unless the package of that plan stands there.

    `packaging`: more options of `moac compile`.
    """
    package, path = package_path(work_dir, effort), plan_path(work_dir, budget, effort)
    plan = Plan.from_json(json.loads(path.read_bytes()))
    if not package.exists() or open_artifact(package, check="sizes").plan != plan:
        places = ["--work-dir", str(kept_dir(work_dir, effort)), "--output", str(package)]
        run_moac(["compile", model, "--plan", str(path), *places, "--force", *packaging])
    return package


def _results(folder: Path) -> dict[str, tuple[str, int]]:
    """Kind, and when it was last of use, of everything kept in a work folder."""
    found = {}
    for path in folder.glob("*"):
        parsed = parse_name(path.name)
        if parsed is not None and parsed[0] in RESULTS:
            found[path.name] = parsed[0], path.stat().st_mtime_ns
    return found


def _kept(
    before: Mapping[str, tuple[str, int]], after: Mapping[str, tuple[str, int]]
) -> dict[str, dict[str, int]]:
    """By kind, how many results served that were there `before`, and how many were made.

    A result that serves is marked with the time of its use.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, (kind, used) in after.items():
        count = counts.setdefault(kind, {"kept": 0, "made": 0})
        if name not in before:
            count["made"] += 1
        elif before[name][1] != used:
            count["kept"] += 1
    return counts
