"""Signing a package with a private key, by the OpenSSF library `model-signing`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from moac.store.atomic import write_whole
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.signature import CURVES, SIGNATURE, folder_digests, require_signing


def sign(package: Path, key: Path, password: bytes | None = None) -> None:
    """Write `moac.sig` over every file of a whole package, in the place of one that is there.

    `key`: a private key in PEM; `password`: where it is encrypted. Raises ArtifactError for a
    package that is not whole, UsageError for a key that is none, and MoacError where a file
    cannot be read or the signature not be written.
    """
    require_signing()
    from model_signing import signing

    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=key, password=password)
    except OSError as error:
        raise UsageError(f"the key {key} cannot be read ({error.strerror}); correct it") from None
    except Exception as error:  # ValueError, TypeError, or of another kind of key
        raise UsageError(_no_key(key, error)) from error
    artifact = open_artifact(package)
    found = folder_digests(artifact.held, artifact.files)
    if found.unread is not None:
        raise MoacError(
            f"{found.unread} in {package} is no file that can be read, so it cannot be signed; "
            "remove it, or sign a copy in which links are followed (cp -rL)"
        )
    signer.set_hashing_config(found)
    with TemporaryDirectory(prefix="moac-") as folder:
        written = Path(folder, SIGNATURE)
        signer.sign(package, written)
        content = written.read_bytes()
    try:
        write_whole(package / SIGNATURE, content)
    except OSError as error:
        raise MoacError(
            f"{package / SIGNATURE} cannot be written ({error.strerror}); check the folder's "
            "permissions"
        ) from error


def is_encrypted(key: Path) -> bool:
    """Whether a password opens the private key; False for what cannot be read."""
    try:
        return b"ENCRYPTED" in key.read_bytes()
    except OSError:
        return False


def _no_key(key: Path, error: Exception) -> str:
    if "password" in str(error).lower():
        return f"{key} is encrypted and this password does not open it; give the right one"
    return (
        f"{key} is no private key in PEM on {CURVES}; make one: "
        f"openssl ecparam -name prime256v1 -genkey -noout -out KEY"
    )
