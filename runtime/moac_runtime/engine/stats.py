"""What answers cost: time, memory, tokens."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stats:
    """What an answer's batch cost. Tokens are summed over rows; None where not measured.

    `decoded_tokens`: answer tokens but the first of each row, which the prefill yields.
    `kv_held_bytes`: most at once; `kv_dense_bytes`: what the model holds by itself at the same
    capacities.
    """

    prompt_tokens: int
    decoded_tokens: int
    prefill_s: float
    decode_s: float
    kv_held_bytes: int
    kv_dense_bytes: int
    peak_memory_bytes: int | None

    @property
    def prompt_tokens_per_s(self) -> float | None:
        """Tokens read in the prefill per second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens decoded per second, all rows together."""
        return self.decoded_tokens / self.decode_s if self.decode_s else None


def peak_memory_bytes() -> int | None:
    """The most memory this process ever held, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows has no such module
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
