"""`moac sign`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moac_runtime.errors import UsageError


@click.command("sign")
@click.argument("package", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path, readable=False),
    metavar="FILE",
    help="your private key, in PEM on P-256, P-384 or P-521",
)
def sign_command(package: Path, key: Path) -> None:
    """Sign PACKAGE, all of its files, with a private key; whoever has the public one can tell.

    Writes moac.sig into the package. Make a key, and its public half, by

    \b
        openssl ecparam -name prime256v1 -genkey -noout -out moac.key
        openssl pkey -in moac.key -pubout -out moac.pub
    """
    from moac.packaging.signing import is_encrypted, sign
    from moac_runtime.package.signature import SIGNATURE

    password = _password(key) if is_encrypted(key) else None
    sign(package, key, password)
    click.echo(f"signed {package} ({package / SIGNATURE})", err=True)


def _password(key: Path) -> bytes:
    """Asked on a terminal. Raises UsageError elsewhere."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            f"{key} is encrypted and nobody can be asked for its password here; give a key "
            "without one"
        )
    text: str = click.prompt(f"password of {key}", hide_input=True, err=True)
    return text.encode()
