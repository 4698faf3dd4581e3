"""Choice of the next token: options, their checks, and one sampler per batch.

Meaning and order of the filters are those of transformers' logits processors: repetition penalty,
temperature, top-k, top-p, min-p. torch is imported inside functions, so that options can be
checked before it loads.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moac_runtime.errors import MoacError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_COLDEST = 1e-30  # a temperature float32 can divide by


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How an answer is chosen and when it ends.

    `temperature`: 0 is greedy, and the filters below are then without effect. `top_k`: 0 is off.
    `top_p`: 1 is off. `min_p`: 0 is off. `repetition_penalty`: 1 is off; it looks at the prompt
    and the answer so far. `seed`: None draws a fresh one for every row; a given seed serves every
    row, so a row's sample is the one it would get alone. `max_tokens`: longest answer in tokens.
    `stop`: strings that end the answer and are not part of it. Raises UsageError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 256
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        # A bare string would otherwise be read as one stop per character.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        penalty = self.repetition_penalty
        _require(0 <= self.temperature < math.inf, "temperature", ">= 0", self.temperature)
        _require(self.top_k >= 0, "top_k", ">= 0", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        _require(0 < penalty < math.inf, "repetition_penalty", "above 0", penalty)
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", "0 to 2**63 - 1", self.seed)
        _require(self.max_tokens >= 1, "max_tokens", ">= 1", self.max_tokens)
        _require(all(self.stop), "stop", "strings of at least one character", self.stop)


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise UsageError(f"{name} must be {expected}, got {found!r}")


def sample(
    logits: Tensor,
    options: SamplingOptions,
    *,
    seen: Tensor | None = None,
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """The next token of every row, `[B]` int64, from `logits` `[B, V]`.

    `seen` `[B, V]` bool: tokens of the row's prompt and answer, for the repetition penalty.
    `generators`: one per row, unused when greedy. Raises MoacError where logits are not finite.
    """
    scores = _scores(logits, options, seen)
    best, choice = scores.max(dim=-1)
    if not best.isfinite().all():
        raise MoacError(
            "the model's logits are not finite numbers, so no token can be chosen; "
            "run with --dtype float32"
        )
    if options.temperature == 0:
        return choice
    return _draw(_probabilities(scores, best, options), generators)


def probabilities(
    logits: Tensor, options: SamplingOptions, *, seen: Tensor | None = None
) -> Tensor:
    """What `sample` draws from at a temperature above 0, `[B, V]` float32, rows summing to 1."""
    scores = _scores(logits, options, seen)
    return _probabilities(scores, scores.amax(dim=-1), options)


def _scores(logits: Tensor, options: SamplingOptions, seen: Tensor | None) -> Tensor:
    scores = logits.float()
    if seen is None or options.repetition_penalty == 1:
        return scores
    return penalise(scores, seen, options.repetition_penalty)


def _probabilities(scores: Tensor, best: Tensor, options: SamplingOptions) -> Tensor:
    # Taking the maximum off first changes no probability and survives any small temperature.
    scores = (scores - best.unsqueeze(-1)) / max(options.temperature, _COLDEST)
    return filter_scores(scores, options).softmax(dim=-1)


def _draw(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Inverse transform sampling: one random number a row, each from the row's own generator."""
    import torch

    if len(generators) != len(probabilities):
        raise ValueError(
            f"generators must be one per row, got {len(generators)} for {len(probabilities)} rows"
        )
    reached = probabilities.double().cumsum(dim=-1)
    draws = [
        torch.rand(1, generator=own, dtype=reached.dtype, device=own.device) for own in generators
    ]
    points = torch.stack(draws) * reached[:, -1:]
    # The first token whose sum passes the point has a probability above 0.
    chosen = torch.searchsorted(reached, points, right=True).squeeze(-1)
    return chosen.clamp(max=probabilities.shape[-1] - 1)


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores of tokens already `seen` made less likely (Keskar et al., arXiv 1909.05858)."""
    weakened = (scores * penalty).where(scores < 0, scores / penalty)
    return weakened.where(seen, scores)


def filter_scores(scores: Tensor, options: SamplingOptions) -> Tensor:
    """`scores` `[B, V]` with every token outside top-k, top-p or min-p at minus infinity."""
    if 0 < options.top_k < scores.shape[-1]:
        scores = _top_k(scores, options.top_k)
    if options.top_p < 1:
        scores = _top_p(scores, options.top_p)
    if options.min_p > 0:
        scores = _min_p(scores, options.min_p)
    return scores


def _top_k(scores: Tensor, k: int) -> Tensor:
    smallest_kept = scores.topk(k, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < smallest_kept, -math.inf)


def _top_p(scores: Tensor, p: float) -> Tensor:
    import torch

    probabilities = scores.softmax(dim=-1)
    # Tokens at or below this sum to at most 1 - p, so they fall: only the others need sorting.
    negligible = (1 - p) / scores.shape[-1]
    most = int((probabilities > negligible).sum(dim=-1).max())
    best, tokens = probabilities.topk(max(most, 1), dim=-1)
    keep = best.cumsum(dim=-1) - best < p
    keep[..., 0] = True
    drop = torch.ones_like(scores, dtype=torch.bool).scatter(-1, tokens, ~keep)
    return scores.masked_fill(drop, -math.inf)


def _min_p(scores: Tensor, p: float) -> Tensor:
    probabilities = scores.softmax(dim=-1)
    drop = probabilities < p * probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(drop, -math.inf)


class Sampler:
    """`sample` for a batch that shrinks: keeps every row's history and random generator."""

    def __init__(
        self,
        options: SamplingOptions,
        prompts: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._options = options
        self._generators = self._seeded(len(prompts), device) if options.temperature > 0 else []
        self._seen = None
        if options.repetition_penalty != 1:
            self._seen = _seen(prompts, vocab_size, device)

    def _seeded(self, rows: int, device: torch.device | str) -> list[torch.Generator]:
        import torch

        seed = self._options.seed
        seeds = [secrets.randbits(63) if seed is None else seed for _ in range(rows)]
        return [torch.Generator(device=device).manual_seed(own) for own in seeds]

    def next(self, logits: Tensor) -> Tensor:
        """The next token of every row, `[B]` int64, remembered as part of its history."""
        tokens = sample(logits, self._options, seen=self._seen, generators=self._generators)
        if self._seen is not None:
            self._seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with `rows` alone, indices into the present batch, in that order."""
        if self._generators:
            self._generators = [self._generators[row] for row in rows]
        if self._seen is not None:
            self._seen = self._seen[list(rows)]


def _seen(prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str) -> Tensor:
    import torch

    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, dtype=torch.long, device=device)] = True
    return seen
