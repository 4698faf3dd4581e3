"""What one turn of a conversation took."""

from __future__ import annotations

from dataclasses import dataclass

from moac_runtime.engine.engine import Engine
from moac_runtime.engine.request import Active
from moac_runtime.engine.sequence import FinishReason


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens and seconds of a turn that has ended, and the bytes its row held.

    `reused_tokens`: of the prompt, those that a kept cache held. `first_token_s`: from the request
    to the first token, `decode_s` from there to the end. `dense_bytes`: what the model holds of as
    many tokens by itself.
    """

    prompt_tokens: int
    reused_tokens: int
    answer_tokens: int
    finish_reason: FinishReason
    capacity: int
    queued_s: float
    first_token_s: float | None
    decode_s: float
    kv_bytes: int
    dense_bytes: int

    @classmethod
    def of(cls, active: Active, engine: Engine) -> Turn:
        """Of a sequence that has ended. Raises ValueError for one that has not."""
        reason, ended = active.answer.finish_reason, active.ended
        if reason is None or ended is None:
            raise ValueError("the sequence has not ended")
        first, begun = active.first_token, active.admitted
        capacity = active.path[-1][0] if active.path else 0
        return cls(
            prompt_tokens=len(active.request.tokens),
            reused_tokens=active.reused,
            answer_tokens=len(active.answer.token_ids),
            finish_reason=reason,
            capacity=capacity,
            queued_s=(ended if begun is None else begun) - active.submitted,
            first_token_s=None if first is None else first - active.submitted,
            decode_s=0.0 if first is None else ended - first,
            kv_bytes=engine.row_bytes(capacity),
            dense_bytes=engine.dense_bytes(capacity),
        )

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of the tokens after the first; None where there are none."""
        return (self.answer_tokens - 1) / self.decode_s if self.decode_s > 0 else None
