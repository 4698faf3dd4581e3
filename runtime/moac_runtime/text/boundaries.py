"""Where the messages of a conversation end among its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moac_runtime.errors import MoacError
from moac_runtime.text.messages import Message
from moac_runtime.text.tokenizer import Tokenizer


def message_ends(
    tokenizer: Tokenizer, messages: Sequence[Message], tokens: Sequence[int], **rendering: Any
) -> tuple[int, ...]:
    """Ascending counts of `tokens`, those of `messages`, that other conversations may share.

    Up to what the first message of a user says: a system message, the tools. And up to the end of
    the last message, without what the template writes to begin an answer. `rendering`: the other
    keywords of `Tokenizer.encode_chat`.
    """
    found = {
        _shared(tokens, other)
        for other in (
            _encoded(tokenizer, _begun_otherwise(messages), rendering),
            _encoded(tokenizer, messages, {**rendering, "add_generation_prompt": False}),
        )
    }
    return tuple(sorted(count for count in found if 0 < count < len(tokens)))


def _begun_otherwise(messages: Sequence[Message]) -> list[Message]:
    """The conversation up to its first message of a user, which says something else."""
    first = next((i for i, one in enumerate(messages) if one.get("role") == "user"), None)
    if first is None:
        return []
    said: Mapping[str, Any] = messages[first]
    other = "1" if str(said.get("content"))[:1] != "1" else "2"
    return [*messages[:first], {**said, "content": other}]


def _encoded(
    tokenizer: Tokenizer, messages: Sequence[Message], rendering: Mapping[str, Any]
) -> list[int]:
    """Token ids, none where the template does not take such a conversation."""
    try:
        return tokenizer.encode_chat(messages, **rendering) if messages else []
    except MoacError:
        return []


def _shared(tokens: Sequence[int], others: Sequence[int]) -> int:
    pairs = zip(tokens, others, strict=False)
    return next(
        (i for i, (one, other) in enumerate(pairs) if one != other),
        min(len(tokens), len(others)),
    )
