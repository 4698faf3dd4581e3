"""Which checkpoint a package was compiled from, and whether a given one is that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moac_runtime.errors import UsageError
from moac_runtime.package.artifact import Artifact

if TYPE_CHECKING:
    from moac.checkpoint import Checkpoint


def told_model(record: Mapping[str, Any]) -> str:
    """A model as people are told of it: the name it had and how its identity begins.

    `record`: `source` and `identity`, which older versions did not write.
    """
    name, identity = record.get("source"), record.get("identity")
    return str(name) if identity is None else f"{name} (identity {str(identity)[:16]})"


def told_plan(provenance: Mapping[str, Any]) -> str | None:
    """Where a package's plan was taken from, None where its own compile found it."""
    file = provenance.get("plan")
    if file is None:
        return None
    kind = "known" if file.get("known") else "from a file"
    edited = ", its rules edited" if file["edited"] else ""
    return f"{kind}: {file['file']} (sha256 {file['sha256'][:16]}){edited}"


def check_source(artifact: Artifact, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is not the model of the package. Raises UsageError naming both.

    Equal spec and equal weights are the same model, whatever the folder or the tokenizer.
    """
    origin = artifact.provenance
    if "identity" not in origin:
        raise UsageError(
            f"{artifact.root} was compiled by an older version of moac, which told models apart "
            f"by other means, so nothing tells whether {checkpoint.source} is its source; compile "
            "it again"
        )
    if checkpoint.identity != origin["identity"]:
        raise UsageError(
            f"{checkpoint.source} is another model than this package's (identity "
            f"{checkpoint.identity[:16]}): {artifact.root} was compiled from "
            f"{told_model(origin)}; give that checkpoint"
        )
