"""Replies in the form that OpenAI's clients read."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moac_runtime.engine.logprobs import TokenLogprobs
from moac_runtime.engine.turn import Turn
from moac_runtime.text.token_bytes import token_bytes
from moac_runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Heading:
    """What every part of one reply begins with; `kind` such as "chat.completion"."""

    kind: str
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def with_(self, choices: Sequence[dict[str, Any]], **rest: Any) -> dict[str, Any]:
        """A reply, or a chunk of one."""
        prefix = "chatcmpl" if self.kind.startswith("chat") else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            **rest,
        }


def usage(prompts: Sequence[Turn], turns: Sequence[Turn]) -> dict[str, Any]:
    """Tokens of all choices; `prompts`: the first choice of each prompt, which count once.

    `moac`, our own: bytes of keys and values that the rows held, and under full attention would
    have.
    """
    read = sum(turn.prompt_tokens for turn in prompts)
    written = sum(turn.answer_tokens for turn in turns)
    held = {
        "kv_bytes": sum(turn.kv_bytes for turn in turns),
        "dense_bytes": sum(turn.dense_bytes for turn in turns),
    }
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(turn.reused_tokens for turn in prompts)},
        "moac": held,
    }


def finish_reason(turn: Turn) -> str:
    """Why an answer ended, as clients know it."""
    return "length" if turn.finish_reason == "length" else "stop"


def chat_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Of the tokens of a chat's answer."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(tokenizer.backend, token)
        shown = raw.decode("utf-8", errors="replace")
        return {"token": shown, "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            {**told(one.token, one.logprob), "top_logprobs": [told(*pair) for pair in one.top]}
            for one in found
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokenizer: Tokenizer, found: Sequence[TokenLogprobs], offset: int
) -> dict[str, Any]:
    """Of the tokens of a completion, of which `offset` characters came before."""

    def shown(token: int) -> str:
        return token_bytes(tokenizer.backend, token).decode("utf-8", errors="replace")

    texts = [shown(one.token) for one in found]
    offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in found],
        "top_logprobs": [{shown(token): value for token, value in one.top} for one in found],
        "text_offset": offsets,
    }
