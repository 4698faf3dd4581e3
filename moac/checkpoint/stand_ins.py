"""What may lie under a file's name instead of the file: pointers, web pages, archives, dead links.

A download gone half way leaves these behind, and the libraries call all of them "damaged".
"""

from __future__ import annotations

import re
from pathlib import Path

from moac_runtime.errors import CheckpointError

_HEAD_BYTES = 512
_LFS = b"version https://git-lfs.github.com/spec/"
_ANNEX = ("/annex/objects/", ".git/annex/objects/")
_PAGE = re.compile(rb"\s*(<!doctype html|<html|<\?xml)", re.IGNORECASE)
_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"7z\xbc\xaf": "7z",
}
_REMARK_BYTES = range(8, 300)  # fewer are a file cut short
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Formats that never are plain text, so that a short text in one is a server's remark.
_BINARY = (".safetensors", ".gguf", ".model")


def check_file(path: Path) -> None:
    """Raises CheckpointError, naming it, where something else lies under the name `path`.

    A path where nothing lies passes, and so does an empty file: readers tell these themselves.
    """
    if path.is_symlink() and not path.exists():
        raise CheckpointError(_dead_link(path))
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    found = _stand_in(path, head)
    if found is not None:
        raise CheckpointError(f"{path} {found}")


def _dead_link(path: Path) -> str:
    target = path.readlink()
    if any(part in str(target) for part in _ANNEX):
        remedy = f"it is kept by git-annex, so run `git annex get {path.name}` in {path.parent}"
    elif target.parent.name == "blobs":
        remedy = "the hub cache has lost it, so download the model again"
    else:
        remedy = f"restore that file, or put a copy of it in place of {path.name}"
    return f"{path} is a link to {target}, where nothing is; {remedy}"


def _stand_in(path: Path, head: bytes) -> str | None:
    """What the first bytes give away, and what to do about it; None where they give nothing."""
    folder, name = path.parent, path.name
    if head.startswith(_LFS):
        return f"is a Git LFS pointer, not the file itself; run `git lfs pull` in {folder}"
    if head.startswith(_ANNEX[0].encode()):
        return (
            f"is a git-annex pointer, not the file itself; run `git annex get {name}` in {folder}"
        )
    if _PAGE.match(head):
        return "is a web page that was saved under this name; download the file itself"
    for magic, kind in _ARCHIVES.items():
        if head.startswith(magic):
            return _archive(path, kind)
    if path.suffix == ".safetensors" and head.startswith(b"GGUF"):
        return "is a GGUF file under another name; rename it to end in .gguf and give that file"
    if path.suffix in _BINARY and (remark := _remark(path, head)):
        return f"holds only the text {remark!r}; download the file itself"
    return None


def _archive(path: Path, kind: str) -> str | None:
    if kind == "zip" and path.suffix in _PICKLES:  # PyTorch's own files are zip archives
        return None
    if kind == "zip" and path.suffix == ".safetensors":
        return (
            "is a zip archive or a PyTorch pickle, not safetensors; unpack it, or save the model "
            "with save_pretrained, which writes safetensors"
        )
    return f"is compressed ({kind}); unpack it and give what comes out"


def _remark(path: Path, head: bytes) -> str | None:
    """The whole of a short printable text, such as "Entry not found"; None for anything else."""
    if path.stat().st_size not in _REMARK_BYTES:
        return None
    try:
        text = " ".join(head.decode("utf-8").split())
    except UnicodeDecodeError:
        return None
    return text[:100] if text and text.isprintable() else None
