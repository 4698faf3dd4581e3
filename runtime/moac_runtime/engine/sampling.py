"""Choice of the next token: options, their checks, and one sampler per sequence.

Meaning and order of the filters are those of transformers' logits processors: repetition penalty,
temperature, top-k, top-p, min-p. The same rules choose from torch tensors and numpy arrays, and
the random numbers come from neither, so a seed means the same on every backend.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from moac_runtime.backends.arrays import Array, library_of
from moac_runtime.errors import MoacError, UsageError

_COLDEST = 1e-30  # a temperature float32 can divide by
_LARGEST = 1e30  # of temperatures and penalties in float32; the likes of it all flatten alike


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
        for name in _NUMBERS:  # arrays take no whole number of more than 64 bits
            object.__setattr__(self, name, _number(getattr(self, name)))
        penalty = self.repetition_penalty
        _require(0 <= self.temperature < math.inf, "temperature", ">= 0", self.temperature)
        _require(self.top_k >= 0, "top_k", ">= 0", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        _require(0 < penalty < math.inf, "repetition_penalty", "above 0", penalty)
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", "0 to 2**63 - 1", self.seed)
        _require(self.max_tokens >= 1, "max_tokens", ">= 1", self.max_tokens)
        _require(all(self.stop), "stop", "strings of at least one character", self.stop)


_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


def _number(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise UsageError(f"{name} must be {expected}, got {found!r}")


def sample(
    logits: Array,
    options: SamplingOptions,
    *,
    seen: Array | None = None,
    generators: Sequence[Random] = (),
) -> Array:
    """The next token of every row, `[B]` int64, from `logits` `[B, V]`, of the same library.

    -1 where a row's logits are not finite: to ask here would wait for a device, so
    `check_chosen` asks once the tokens are on the host.

    `seen` `[B, V]` bool: tokens of the row's prompt and answer, for the repetition penalty.
    `generators`: one per row, unused when greedy.
    """
    scores = _scores(logits, options, seen)
    best, choice = library_of(scores).best(scores)
    library = library_of(best)
    usable = library.finite(best)
    if options.temperature > 0:
        scores = library.where(usable[:, None], scores, 0.0)
        best = library.where(usable, best, 0.0)
        choice = _draw(_probabilities(scores, best, options), generators)
    return library.where(usable, choice, -1)


def check_chosen(tokens: Sequence[int]) -> None:
    """Raises MoacError where `sample` found a row's logits to be no numbers."""
    if min(tokens) < 0:
        raise MoacError(
            "the model's logits are not finite numbers, so no token can be chosen; "
            "run with --dtype float32"
        )


def probabilities(logits: Array, options: SamplingOptions, *, seen: Array | None = None) -> Array:
    """What `sample` draws from at a temperature above 0, `[B, V]` float32, rows summing to 1."""
    scores = _scores(logits, options, seen)
    return _probabilities(scores, library_of(scores).best(scores)[0], options)


def _scores(logits: Array, options: SamplingOptions, seen: Array | None) -> Array:
    scores = library_of(logits).float32(logits)
    if seen is None or options.repetition_penalty == 1:
        return scores
    return penalise(scores, seen, options.repetition_penalty)


def _probabilities(scores: Array, best: Array, options: SamplingOptions) -> Array:
    # Taking the maximum off first changes no probability and survives any small temperature.
    scores = (scores - best[:, None]) / min(max(options.temperature, _COLDEST), _LARGEST)
    return library_of(scores).softmax(filter_scores(scores, options))


def _draw(probabilities: Array, generators: Sequence[Random]) -> Array:
    """Inverse transform sampling: one random number a row, each from the row's own generator."""
    if len(generators) != len(probabilities):
        raise ValueError(
            f"generators must be one per row, got {len(generators)} for {len(probabilities)} rows"
        )
    library = library_of(probabilities)
    reached = library.float64(probabilities).cumsum(-1)
    points = library.like(reached, [[own.random()] for own in generators]) * reached[:, -1:]
    # The first token whose sum passes the point has a probability above 0, and the last sum does.
    return (reached <= points).sum(-1)


def penalise(scores: Array, seen: Array, penalty: float) -> Array:
    """Scores of tokens already `seen` made less likely (Keskar et al., arXiv 1909.05858)."""
    library, penalty = library_of(scores), min(penalty, _LARGEST)
    weakened = library.where(scores < 0, scores * penalty, scores / penalty)
    return library.where(seen, weakened, scores)


def filter_scores(scores: Array, options: SamplingOptions) -> Array:
    """`scores` `[B, V]` with every token outside top-k, top-p or min-p at minus infinity."""
    if 0 < options.top_k < scores.shape[-1]:
        scores = _top_k(scores, options.top_k)
    if options.top_p < 1:
        scores = _top_p(scores, options.top_p)
    if options.min_p > 0:
        scores = _min_p(scores, options.min_p)
    return scores


def _top_k(scores: Array, k: int) -> Array:
    library = library_of(scores)
    smallest_kept = library.top(scores, k)[0][:, -1:]
    return library.where(scores >= smallest_kept, scores, -math.inf)


def _top_p(scores: Array, p: float) -> Array:
    library = library_of(scores)
    probabilities = library.softmax(scores)
    # Tokens at or below this sum to at most 1 - p, so they fall: only the others need sorting.
    negligible = (1 - p) / scores.shape[-1]
    most = int((probabilities > negligible).sum(-1).max())
    best, tokens = library.top(probabilities, max(most, 1))
    keep = best.cumsum(-1) - best < p
    keep[:, 0] = True
    return library.where(library.marked(scores, tokens, keep), scores, -math.inf)


def _min_p(scores: Array, p: float) -> Array:
    library = library_of(scores)
    probabilities = library.softmax(scores)
    likeliest = library.best(probabilities)[0][:, None]
    return library.where(probabilities >= p * likeliest, scores, -math.inf)


class Sampler:
    """One sequence's choice of tokens: its options, its history, random numbers of its own."""

    def __init__(self, options: SamplingOptions, prompt: Sequence[int]) -> None:
        self.options = options
        seed = secrets.randbits(63) if options.seed is None else options.seed
        self._generators = [Random(seed)] if options.temperature > 0 else []
        self._seen = set(prompt) if options.repetition_penalty != 1 else None

    @property
    def kind(self) -> tuple[float, ...]:
        """What sequences must share to choose from one array."""
        one = self.options
        return one.temperature, one.top_k, one.top_p, one.min_p, one.repetition_penalty


def next_tokens(logits: Array, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each of the sequences of `logits` `[B, V]`, remembered by each.

    A sequence's token does not depend on those beside it. -1 where its logits are not finite
    numbers, as `sample` says.
    """
    alike: dict[tuple[float, ...], list[int]] = {}
    for place, sampler in enumerate(samplers):
        alike.setdefault(sampler.kind, []).append(place)
    found = [-1] * len(samplers)
    for places in alike.values():
        part = logits if len(places) == len(samplers) else logits[places]
        tokens = _sample_alike(part, [samplers[place] for place in places])
        for place, token in zip(places, tokens, strict=True):
            found[place] = token
    return found


def _sample_alike(logits: Array, samplers: Sequence[Sampler]) -> list[int]:
    generators = [own for sampler in samplers for own in sampler._generators]
    seen = _seen(logits, samplers) if samplers[0]._seen is not None else None
    tokens = sample(logits, samplers[0].options, seen=seen, generators=generators)
    chosen: list[int] = tokens.tolist()  # the one wait for the device
    for sampler, token in zip(samplers, chosen, strict=True):
        if sampler._seen is not None and token >= 0:
            sampler._seen.add(token)
    return chosen


def _seen(logits: Array, samplers: Sequence[Sampler]) -> Array:
    library = library_of(logits)
    seen = library.unseen(logits)
    for row, sampler in enumerate(samplers):
        library.mark(seen, row, list(sampler._seen or ()))
    return seen
