"""`moac check`."""

from __future__ import annotations

import json

import click

from moac.cli.options import numbers
from moac.extras import require
from moac_runtime.errors import CheckFailed


@click.command("check")
@click.argument("model")
@click.option("--revision", metavar="REV", help="commit, branch or tag of a hub model")
@click.option(
    "--lengths",
    callback=numbers,
    metavar="N,N,...",
    help="tokens at which KV bytes are told  [doubling up to the context]",
)
@click.option("--json", "as_json", is_flag=True, help="everything as JSON")
def check_command(
    model: str, revision: str | None, lengths: tuple[int, ...] | None, as_json: bool
) -> None:
    """Tell whether MODEL is served and why, by which backends, and the KV bytes it would hold.

    Reads the config and the tensors' headers, and no weight. Exit code 3 where it is not served.
    """
    require("compile")
    from moac.pipeline.served import check_model
    from moac.show.served import served_text

    found = check_model(model, revision=revision, lengths=lengths)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif found["served"]:
        click.echo(served_text(found))
    if not found["served"]:
        raise CheckFailed(found["reason"])
