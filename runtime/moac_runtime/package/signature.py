"""Who signed a package, by the OpenSSF library `model-signing`: every file of it, and no other.

`moac.sig` is a Sigstore bundle over the names and SHA-256 of all files but itself, as the library
writes it for any folder, so its own tools verify packages too. A file that the manifest lists is
compared by what the manifest says of it, since that is what `integrity.py` holds it to.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moac_runtime.errors import CheckFailed, UsageError
from moac_runtime.host.extras import require
from moac_runtime.package.held import HeldFiles
from moac_runtime.package.integrity import MANIFEST, FileRecord, sha256
from moac_runtime.package.json_text import MOST_BYTES

SIGNATURE = "moac.sig"
CURVES = "P-256, P-384 or P-521"

_UNREAD = "00"  # a digest that nothing has
_ALTERED = r"Hash mismatch for \\*'(.+?)\\*': Expected"
_OTHER = "get the package again from whoever signed it"
_FILES = {
    "method": "files",
    "hash_type": "sha256",
    "allow_symlinks": False,
    "ignore_paths": [SIGNATURE],
}


def require_signing() -> None:
    """Raise UsageError, which names the install, where the library is not."""
    require("sign", "a signature")


class FolderDigests:
    """What a folder holds, told to the library in the place of its own hashing.

    `digests`: SHA-256 in hex by name. `added`, `left_out`: names that a signature lacks, and names
    that it has and the folder has not; known once it was compared.
    """

    def __init__(self, name: str, digests: Mapping[str, str]) -> None:
        self._name, self._digests = name, digests
        self.added: list[str] = []
        self.left_out: list[str] = []

    @property
    def unread(self) -> str | None:
        """The first name that nothing can be read under, if there is one."""
        return next((name for name in self._digests if self._digests[name] == _UNREAD), None)

    def hash(self, model_path: Path, *, files_to_hash: Any = None) -> Any:
        """The library's manifest of it. `files_to_hash`: paths of the names that are signed."""
        from model_signing import manifest

        if files_to_hash is not None:
            signed = {Path(path).relative_to(model_path).as_posix() for path in files_to_hash}
            self.added = sorted(self._digests.keys() - signed)
            self.left_out = sorted(signed - self._digests.keys())
        kind = manifest.SerializationType.from_args(_FILES)
        items = [
            kind.new_item(name, manifest.hashing.Digest("sha256", bytes.fromhex(digest)))
            for name, digest in self._digests.items()
        ]
        return manifest.Manifest(self._name, items, kind)

    def add_ignored_paths(self, **_: object) -> None:
        """Nothing of a package is left out, whatever a signature says."""


def folder_digests(held: HeldFiles, files: Mapping[str, FileRecord]) -> FolderDigests:
    """Every file of a package. `files`: what its manifest lists, which is not hashed again."""
    digests = dict.fromkeys(held.linked_folders(), _UNREAD)
    for name in held.names():
        if name != SIGNATURE:
            digests[name] = files[name].sha256 if name in files else _digest(held, name)
    return FolderDigests(held.root.resolve().name, digests)


def _digest(held: HeldFiles, name: str) -> str:
    """Of a file that no manifest lists."""
    try:
        with held.opened(name) as descriptor:
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            return sha256(descriptor) if regular else _UNREAD
    except OSError:  # a link that leads nowhere, a socket, another user's file
        return _UNREAD


def check_signature(held: HeldFiles, files: Mapping[str, FileRecord], key: Path) -> None:
    """Check that the package was signed, as it is, by the private half of the public `key`.

    Raises CheckFailed, which says what is wrong, and UsageError for a key that is none.
    """
    require_signing()
    verifier = _verifier(key)
    signature = _read_signature(held, key)
    found = folder_digests(held, files)
    verifier.set_hashing_config(found).set_ignore_unsigned_files(True)
    root = held.root
    try:
        # the library tells of an old kind of signature on standard output
        with TemporaryDirectory(prefix="moac-") as folder, redirect_stdout(sys.stderr):
            copy = Path(folder, SIGNATURE)
            copy.write_bytes(signature)
            verifier.verify(root, copy)
    except Exception as error:  # of the library, of cryptography, of whatever reads the bundle
        raise CheckFailed(_reason(root, key, found, error)) from error


def _verifier(key: Path) -> Any:
    from model_signing import verifying

    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=key)
    except OSError as error:
        raise UsageError(f"the key {key} cannot be read ({error.strerror}); correct it") from None
    except Exception as error:  # ValueError, or of another kind of key
        raise UsageError(
            f"{key} is no public key in PEM on {CURVES}; make one from the private key: "
            "openssl pkey -in KEY -pubout -out KEY.pub"
        ) from error


def _read_signature(held: HeldFiles, key: Path) -> bytes:
    try:
        return held.read(SIGNATURE, MOST_BYTES)
    except FileNotFoundError:
        raise CheckFailed(
            f"{held.root} is not signed (it holds no {SIGNATURE}), expected a signature by "
            f"{key}: sign it (moac sign PACKAGE --key KEY), or {_OTHER}"
        ) from None
    except OSError as error:
        raise CheckFailed(
            f"{held.root / SIGNATURE} cannot be read ({error.strerror}): check its permissions"
        ) from error


def _reason(root: Path, key: Path, found: FolderDigests, error: Exception) -> str:
    """What is wrong with a package that did not verify."""
    if "Key mismatch" in str(error):
        return f"{root} is signed by another key than {key}: {_OTHER}, or give that one's key"
    if found.added:
        return (
            f"{found.added[0]} was added to {root} after it was signed, expected signed files "
            "alone: remove it"
        )
    if found.left_out:
        return f"{found.left_out[0]} was taken out of {root} after it was signed: {_OTHER}"
    if "Signature mismatch" in str(error):
        altered = re.findall(_ALTERED, str(error))  # quotes in a digest have the others escaped
        named = next((name for name in altered if name != MANIFEST), MANIFEST)
        return f"{named} in {root} was altered after it was signed: {_OTHER}"
    return f"{SIGNATURE} in {root} is no signature by {key} of any package: {_OTHER}"
