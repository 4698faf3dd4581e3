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
    from moac.show.damage import telling_damage
    from moac.show.diff_summary import diff_text
    from moac.show.diffing import diff, open_side

    with telling_damage(f"{a} or {b}"):
        found = diff(open_side(a), open_side(b))
        text = json.dumps(found, indent=2) if as_json else diff_text(found)
    click.echo(text)
