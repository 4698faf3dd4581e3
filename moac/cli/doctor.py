"""`moac doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("doctor")
@click.argument("package", required=False, type=click.Path(path_type=Path, readable=False))
@click.option("--json", "as_json", is_flag=True, help="everything as JSON")
def doctor_command(package: Path | None, as_json: bool) -> None:
    """Tell what this machine has and lacks, and what PACKAGE would run with here, and why."""
    from moac.doctor.examine import examine
    from moac.doctor.text import doctor_text

    found = examine(package)
    click.echo(json.dumps(found, indent=2) if as_json else doctor_text(found))
