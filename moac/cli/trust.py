"""`moac trust`."""

from __future__ import annotations

from pathlib import Path

import click

from moac_runtime.errors import MoacError


@click.command("trust")
@click.argument("package", type=click.Path(path_type=Path, readable=False))
@click.option("--forget", is_flag=True, help="trust it no more")
@click.option(
    "--public-key",
    type=click.Path(path_type=Path, readable=False),
    metavar="FILE",
    help="only if this key signed it",
)
def trust_command(package: Path, forget: bool, public_key: Path | None) -> None:
    """Let PACKAGE's own code, its kernels, run here like that of packages compiled here.

    What is recorded is its digest, for this user: a copy of the package is trusted too, and one
    that was altered is not.
    """
    from moac_runtime.package.artifact import open_artifact
    from moac_runtime.package.trust import distrust, trust

    artifact = open_artifact(package, signed_by=public_key)
    if not forget:
        trust(artifact.digest, str(package.resolve()))
        click.echo(f"trusted {package} ({artifact.digest[:16]})", err=True)
    elif distrust(artifact.digest):
        click.echo(f"{package} is trusted no more ({artifact.digest[:16]})", err=True)
    else:
        raise MoacError(f"{package} was not trusted ({artifact.digest[:16]}); nothing was changed")
