"""`moac verify`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moac.cli.options import numbers
from moac.extras import require
from moac_runtime.errors import CheckFailed


@click.command("verify")
@click.argument("package", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--source",
    metavar="MODEL",
    help="the checkpoint it was compiled from: compare with the original model",
)
@click.option(
    "--lengths",
    callback=numbers,
    metavar="N,N,...",
    help="prompt lengths for --source, in tokens  [64,1000,4000]",
)
@click.option(
    "--public-key",
    type=click.Path(path_type=Path, readable=False),
    metavar="FILE",
    help="first of all check that this key signed it, every file",
)
@click.option("--trust", is_flag=True, help="run the package's own kernels to check them")
@click.option("--json", "as_json", is_flag=True, help="the checks as JSON")
def verify_command(
    package: Path,
    source: str | None,
    lengths: tuple[int, ...] | None,
    public_key: Path | None,
    trust: bool,
    as_json: bool,
) -> None:
    """Check PACKAGE: its files, its golden logits and, with --source, the original model.

    Its kernels are checked too where it is trusted: compiled here, signed by --public-key, or
    with --trust.
    """
    require("torch" if source is None else "compile")
    from moac.pipeline.verify import verify

    checkpoint = None
    if source is not None:
        from moac.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(source)
    checks = []
    for check in verify(
        package, checkpoint=checkpoint, lengths=lengths, trust=trust, signed_by=public_key
    ):
        checks.append(check)
        if not as_json:
            word = "ok    " if check.ok else "FAILED"
            click.echo(f"{word}  {check.name}  {check.value:.4g} (limit {check.limit:.4g})")
    failed = [check for check in checks if not check.ok]
    if as_json:
        found = {"ok": not failed, "checks": [check.to_json() for check in checks]}
        click.echo(json.dumps(found, indent=2))
    if failed:
        raise CheckFailed(failed[0].reason or f"{package} does not hold what it promises")
