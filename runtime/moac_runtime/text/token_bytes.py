"""The bytes that one token stands for, which may be a part of a character."""

from __future__ import annotations

import re
from functools import cache

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(backend: tokenizers.Tokenizer, token: int) -> bytes:
    """Of `token`, a control token's being its spelling."""
    piece = backend.id_to_token(token)
    if piece is None:
        return b""
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    text = backend.decode([token], skip_special_tokens=False)
    if "\ufffd" in text and all(character in _byte_of() for character in piece):
        return bytes(_byte_of()[character] for character in piece)
    return text.encode("utf-8")


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(256 + place): byte for place, byte in enumerate(hidden)}
