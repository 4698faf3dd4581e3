"""`moac diff`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("diff")
@click.argument("a", type=click.Path(path_type=Path, readable=False))
@click.argument("b", type=click.Path(path_type=Path, readable=False))
@click.option("--json", "as_json", is_flag=True, help="everything as JSON")
def diff_command(a: Path, b: Path, as_json: bool) -> None:
    """Compare A and B, each a package or a plan.json: spans, memory, losses, provenance."""
    from moac.show.diff_summary import diff_text
    from moac.show.diffing import diff, open_side

    found = diff(open_side(a), open_side(b))
    click.echo(json.dumps(found, indent=2) if as_json else diff_text(found))
