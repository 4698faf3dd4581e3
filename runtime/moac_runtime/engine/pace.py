"""How much of the prompts a step reads, so that sequences which write are not held up for long."""

from __future__ import annotations

_LEAST = 32  # tokens: below this a step costs what reading the weights costs
_FADE = 0.3  # of the newest measurement


class Pace:
    """`tokens`: most of a step. `seconds`: a step beside sequences that write takes about that."""

    def __init__(self, tokens: int, seconds: float) -> None:
        self._tokens, self._seconds = tokens, seconds
        self._per_token: float | None = None

    def room(self, writing: int) -> int:
        """Prompt tokens to read beside `writing` sequences that get one token each."""
        room = max(self._tokens - writing, 1)
        if not writing or self._per_token is None:
            return room
        return max(int(min(room, self._seconds / self._per_token)), min(_LEAST, room))

    def took(self, read: int, seconds: float) -> None:
        """A step that read so many prompt tokens took so long."""
        if read < _LEAST:
            return
        found = seconds / read
        known = self._per_token
        self._per_token = found if known is None else known + _FADE * (found - known)
