"""From a package to torch's own operators, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.plan import Plan
from moac_runtime.package.weights import load_weights


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A model on torch's operators, a `Backend`.

    `plan`: the one that sessions run under where they are given no other.
    """

    decoder: Decoder
    plan: Plan
    head_order: Sequence[Sequence[int]]
    kernels = None

    @property
    def dtype(self) -> str:
        """Of weights and caches, by name."""
        return str(self.decoder.dtype).removeprefix("torch.")

    def session(self, plan: Plan | None = None) -> TorchSession:
        """A session without rows, under the model's own plan or another one."""
        return TorchSession(self.decoder, plan or self.plan, self.head_order)


def open_torch(
    artifact: Artifact, *, dtype: str | None = None, device: torch.device | str = "cpu"
) -> TorchModel:
    """Read a package's weights. `dtype`: None is the package's own. Raises ArtifactError."""
    kind: torch.dtype = getattr(torch, dtype or artifact.dtype)
    decoder = Decoder(artifact.spec, load_weights(artifact, kind), dtype=kind, device=device)
    return TorchModel(decoder, artifact.plan, artifact.head_order)
