"""Golden answers: prompts and the logits that the dense-masked float32 reference gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moac_runtime.errors import ArtifactError
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.integrity import REMEDY
from moac_runtime.package.weights import open_tensors

if TYPE_CHECKING:
    import torch

GOLDEN = "golden.safetensors"


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """`tokens` `[T]` int64, `positions` `[P]` int64, `logits` `[P, V]` float32 at those positions.

    `capacity`: the session's N in tokens. `source`: the logits of the checkpoint itself, where the
    package holds it rounded to int8 and `logits` are those of the rounded one.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor
    capacity: int
    source: torch.Tensor | None = None


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
    tokens, positions = (file.get_tensor(f"{prompt}.{part}") for part in ("tokens", "positions"))
    shape = len(positions), vocab_size
    source = f"{prompt}.source" in file.keys()  # noqa: SIM118
    return GoldenPrompt(
        tokens,
        positions,
        _logits(file, f"{prompt}.logits", shape),
        int(capacity),
        _logits(file, f"{prompt}.source", shape) if source else None,
    )


def _logits(file: Any, name: str, shape: tuple[int, int]) -> torch.Tensor:
    found: torch.Tensor = file.get_tensor(name)
    if found.shape != shape:
        raise ArtifactError(
            f"{name} in {GOLDEN} has shape {list(found.shape)}, expected {list(shape)}: {REMEDY}"
        )
    return found
