"""Golden answers: prompts and the logits that the dense-masked float32 reference gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moac_runtime.artifact import Artifact
from moac_runtime.errors import ArtifactError
from moac_runtime.integrity import REMEDY
from moac_runtime.weights import open_tensors

if TYPE_CHECKING:
    import torch

GOLDEN = "golden.safetensors"


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """`tokens` `[T]` int64, `positions` `[P]` int64, `logits` `[P, V]` float32 at those positions.

    `capacity`: the session's N in tokens.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor
    capacity: int


def load_golden(artifact: Artifact) -> tuple[GoldenPrompt, ...]:
    """The package's golden prompts, in the order they were written. Raises ArtifactError."""
    with open_tensors(artifact, GOLDEN) as file:
        prompts = sorted({key.rpartition(".")[0] for key in file.keys()}, key=_number)  # noqa: SIM118
        if not prompts:
            raise ArtifactError(f"{GOLDEN} holds no prompt, expected at least one: {REMEDY}")
        return tuple(_prompt(file, prompt, artifact.spec.vocab_size) for prompt in prompts)


def _number(prompt: str) -> tuple[int, str]:
    return (int(prompt) if prompt.isdecimal() else 0, prompt)


def _prompt(file: Any, prompt: str, vocab_size: int) -> GoldenPrompt:
    names = {f"{prompt}.{part}" for part in ("tokens", "positions", "logits")}
    capacity = (file.metadata() or {}).get(f"{prompt}.capacity", "")
    if missing := sorted(names - set(file.keys())):
        raise ArtifactError(f"{GOLDEN} lacks {missing[0]}, expected it: {REMEDY}")
    if not capacity.isdecimal():
        raise ArtifactError(
            f"{GOLDEN} has {prompt}.capacity = {capacity!r}, expected a number of tokens: {REMEDY}"
        )
    tokens, positions, logits = (
        file.get_tensor(f"{prompt}.{part}") for part in ("tokens", "positions", "logits")
    )
    if logits.shape != (len(positions), vocab_size):
        raise ArtifactError(
            f"{prompt}.logits in {GOLDEN} has shape {list(logits.shape)}, "
            f"expected {[len(positions), vocab_size]}: {REMEDY}"
        )
    return GoldenPrompt(tokens, positions, logits, int(capacity))
