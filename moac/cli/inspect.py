"""`moac inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command("inspect")
@click.argument("package", type=click.Path(path_type=Path, readable=False))
@click.option("--json", "as_json", is_flag=True, help="everything as JSON")
def inspect_command(package: Path, as_json: bool) -> None:
    """Show PACKAGE: its plan, density and KV bytes at each length, kernels, provenance."""
    from moac.show.damage import telling_damage
    from moac.show.inspection import inspect_package
    from moac.show.summary import inspection_text
    from moac.show.terminal_map import Look

    with telling_damage(package):
        found = inspect_package(package)
        look = Look.of(sys.stdout)
        text = json.dumps(found, indent=2) if as_json else inspection_text(found, look)
    click.echo(text)
