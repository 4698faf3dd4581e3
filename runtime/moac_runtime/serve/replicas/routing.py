"""Which replica a request goes to: where its beginning was read, unless others are less busy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_SLACK = 4
"""Requests that a replica may have beyond the least busy one before a chat goes elsewhere."""
_BEGINNING = 256
"""Characters, or tokens, of a prompt without messages that tell it from others."""


def key_of(body: bytes) -> str:
    """What the requests of one conversation share, "" where a body tells nothing.

    It is the messages up to the user's first, which every turn sends again, or the beginning of a
    prompt.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(found, dict):
        return ""
    begun = _begun(found.get("messages")) or _prompt(found.get("prompt"))
    if not begun:
        return ""
    return hashlib.sha256(json.dumps(begun, sort_keys=True).encode()).hexdigest()


def _begun(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        return []
    users = (
        place
        for place, message in enumerate(messages)
        if isinstance(message, dict) and message.get("role") == "user"
    )
    return messages[: next(users, len(messages)) + 1]


def _prompt(prompt: Any) -> Any:
    return prompt[:_BEGINNING] if isinstance(prompt, str | list) else None


def ranked(key: str, busy: Mapping[str, int]) -> list[str]:
    """The replicas of `busy`, which counts the requests of each, best first.

    A key has an order of its own over replicas, which stays what it is for the others when one
    goes or comes; a request without a key goes to the least busy.
    """
    by_key = sorted(busy, key=lambda name: hashlib.sha256(f"{key} {name}".encode()).digest())
    least_busy = sorted(by_key, key=busy.__getitem__)
    if not key or not busy or busy[by_key[0]] > busy[least_busy[0]] + _SLACK:
        return least_busy
    return by_key
