"""Finished cells of an evaluation in the work folder, so that one cut short goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from moac.evaluation.sessions import Sessions
from moac.store.keys import parts_key
from moac.store.sources import source_digest
from moac.store.workspace import Workspace
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.plan import Plan

LIBRARIES = ("moac", "torch", "transformers", "tokenizers")
"""Those that an evaluation's numbers come from."""

Row = Sequence[float]
"""The numbers of one case or text."""

_KIND = "eval"


@dataclass(frozen=True, slots=True)
class KeptCells:
    """The rows of each cell under a key made of everything that they follow from.

    `run`: what all cells of an evaluation have in common.
    """

    workspace: Workspace
    run: Mapping[str, Any]

    @classmethod
    def of(
        cls, workspace: Workspace, artifact: Artifact, sessions: Sessions, *, batch: int
    ) -> KeptCells:
        """Of a package that `sessions` runs, `batch` cases at once."""
        run = {
            "package": {name: record.sha256 for name, record in artifact.files.items()},
            "head_order": artifact.head_order,
            "dtype": artifact.dtype,
            "code": source_digest("moac.evaluation.runner"),
            "versions": library_versions(),
            "runs": [sessions.backend, sessions.runs, torch.get_num_threads()],
            "batch": batch,
        }
        return cls(workspace, run)

    def key(self, plan: Plan, *, asked: object, **cell: Any) -> str:
        """The key of a `cell` under `plan`; `asked`: its cases as JSON values."""
        text = json.dumps(asked, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return parts_key(run=self.run, plan=plan.to_json(), asked=digest, **cell)

    def load(self, name: str) -> list[Row] | None:
        """The rows kept under a key, or None."""
        found: list[Row] | None = self.workspace.load_json(_KIND, name)
        return found

    def save(self, name: str, rows: Sequence[Row]) -> None:
        """Keep the rows of a finished cell. Raises MoacError where nothing can be written."""
        self.workspace.save_json(_KIND, name, list(rows))


def library_versions() -> dict[str, str]:
    """The installed version of each of `LIBRARIES`."""
    return {name: version(name) for name in LIBRARIES}
