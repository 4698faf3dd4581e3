"""Add a plan that was measured thoroughly to those that moac brings.

    python tools/known_plan.py plan.json

The plan is copied as it is, under the name that tells its model and budget. One that was edited,
measured less, or planned for somebody's own texts is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moac.effort import EFFORTS
from moac.pipeline.known import KnownPlan, read_known
from moac_runtime.errors import ArtifactError, MoacError, UsageError

ROOT = Path(__file__).parents[1]
EFFORT = "thorough"


def add(plan: Path, folder: Path, *, replace: bool) -> Path:
    """Copy `plan` into `folder` and return where it lies.

    Raises ArtifactError for a plan that is not fit to be known, UsageError where one of the same
    model and budget is known already and `replace` is not said.
    """
    found, data = read_known(plan), plan.read_bytes()
    check_measured(plan, json.loads(data)["arguments"])
    former = known_of(found, folder)
    if former and not replace:
        raise UsageError(
            f"{former[0]} is of the same model and budget; give --replace to put {plan} in its "
            "place"
        )
    target = folder / found.name
    target.write_bytes(data)
    for path in former:
        if path != target:
            path.unlink()
    return target


def check_measured(plan: Path, asked: dict[str, Any]) -> None:
    """Raise ArtifactError for a plan that was not measured as every known one is."""
    if asked.get("calibration") is not None:
        texts = asked["calibration"]["file"]
        raise ArtifactError(
            f"{plan} was planned for texts of {texts}, expected one for every user: leave out "
            "--calibration"
        )
    effort, full = asked.get("effort"), EFFORTS[EFFORT]
    samples, plans = asked.get("samples", 0), asked.get("plans", 0)
    if effort != EFFORT or samples < full.samples or plans < full.plans:
        raise ArtifactError(
            f"{plan} was measured with effort {effort}, {samples} samples and {plans} plans, "
            f"expected {EFFORT}, {full.samples} and {full.plans}: write it with `moac plan "
            f"--effort {EFFORT}`"
        )


def known_of(plan: KnownPlan, folder: Path) -> list[Path]:
    """The plans in `folder` of the same model and budget, whatever their names."""
    others = [read_known(path) for path in sorted(folder.glob("*.json"))]
    same = (plan.model["identity"], plan.budget)
    return [other.path for other in others if (other.model["identity"], other.budget) == same]


def main() -> None:
    """Add the plan and print its path. Exits with a sentence where it is not fit."""
    parser = argparse.ArgumentParser(description="Add a measured plan to those that moac brings.")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--replace", action="store_true", help="in place of the one known so far")
    parser.add_argument("--folder", type=Path, default=ROOT / "moac" / "plans", metavar="DIR")
    options = parser.parse_args()
    try:
        print(add(options.plan, options.folder, replace=options.replace))
    except (MoacError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
