"""What the user named: a directory, a `.gguf` file, or a model id on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moac.checkpoint.stand_ins import check_file
from moac_runtime.errors import CheckpointError, UsageError
from moac_runtime.package.json_text import read_json_file

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SETTINGS = ["*.json", "*.jinja", "*.model", "merges.txt"]
_WEIGHTS = ["*.safetensors"]


def is_hub_id(source: str) -> bool:
    """Whether `source`, which is no path here, can be a model id such as `org/name`."""
    return _HUB_ID.fullmatch(source) is not None and not source.endswith(".gguf")


def local_path(source: str, revision: str | None) -> Path | None:
    """The directory or file `source` names, None where it can only be a hub id.

    Raises CheckpointError where there is neither, UsageError for a revision of something local.
    """
    path = Path(source).expanduser()
    check_file(path)
    if path.exists():
        if revision is not None:
            raise UsageError(
                f"a revision ({revision!r}) belongs to a hub id, but {source} is a local path; "
                "leave the revision out"
            )
        if not path.is_dir() and not path.is_file():
            raise CheckpointError(
                f"{source} is neither a directory nor a file; give a directory with config.json, "
                "a .gguf file or a hub id such as org/name"
            )
        return path
    if is_hub_id(source):
        return None
    raise CheckpointError(
        f"there is no checkpoint at {source}; give a directory with config.json, a .gguf file "
        "or a hub id such as org/name"
    )


def file_refusal(path: Path) -> CheckpointError:
    """The sentence for a file that is no `.gguf`, with what to give instead of it."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        remedy = "it is one under another name, so rename it to end in .gguf"
    elif (path.parent / "config.json").is_file():
        remedy = f"it lies in a checkpoint, so give its directory {path.parent}"
    elif path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        remedy = (
            "pickled weights are not read because a pickle can run code; give a directory with "
            "config.json and safetensors"
        )
    else:
        remedy = "give a directory with config.json, a .gguf file or a hub id such as org/name"
    return CheckpointError(f"{path} is a file but no .gguf; {remedy}")


def download_settings(source: str, revision: str | None) -> Path:
    """The snapshot folder of a hub id with its small files: config, tokenizer, indexes."""
    return _download(source, revision, _SETTINGS)


def download_weights(source: str, revision: str | None) -> Path:
    """The same snapshot with its safetensors."""
    return _download(source, revision, _SETTINGS + _WEIGHTS)


def _download(source: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        folder = snapshot_download(
            source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except GatedRepoError:
        raise CheckpointError(
            f"the model {source} is gated; ask for access on the hub and log in (`hf auth login`)"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no directory {source} here and no public model of that id on the hub; "
            "check the spelling, or log in (`hf auth login`) if it is private"
        ) from None
    except Exception as error:  # the hub client's errors share no base class
        raise CheckpointError(
            f"there is no directory {source} here, and the hub gave no such model at revision "
            f"{revision or 'main'} ({type(error).__name__}); check the id and the connection, "
            "or download the model elsewhere and give its directory"
        ) from None
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where the file is anything else."""
    check_file(path)
    try:
        data = read_json_file(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}); restore it from the original checkpoint"
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(data).__name__} where an object was expected; "
            "restore it from the original checkpoint"
        )
    return data
