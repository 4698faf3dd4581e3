"""Text piece by piece: whole characters from tokens that arrive one by one, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

_UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not a whole character


class TextStream:
    """Turns tokens into text as they arrive, whole characters only. `decode`: a tokenizer's.

    `tokenizers.decoders.DecodeStream` does the same but raises once a byte-fallback model writes
    bytes that are no character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._shown: list[int] = []  # the last tokens that became text: context for the next
        self._fresh: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is unfinished."""
        self._fresh.append(token)
        text = self._new_text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._shown, self._fresh = self._fresh, []
        return text

    def finish(self) -> str:
        """The text still held back, without the bytes of a character that was never finished."""
        return self._new_text().rstrip(_UNFINISHED)

    def _new_text(self) -> str:
        before, whole = self._decode(self._shown), self._decode(self._shown + self._fresh)
        # Bytes that are no character can change how the ones before them decode.
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._fresh)


class StopStrings:
    """Cuts text at the first stop string, holding back what may turn out to begin one.

    Stop strings are looked for in everything the model writes, hidden text (that of control
    tokens) included; what comes out leaves hidden text out.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held: list[tuple[str, bool]] = []  # characters, and whether they are hidden
        self.found = False

    def push(self, piece: str, *, hidden: bool = False) -> str:
        """The part of the text so far that no stop string can touch any more."""
        if self.found:
            return ""
        characters = [*self._held, *((c, hidden) for c in piece)]
        text = "".join(c for c, _ in characters)
        starts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, []
            return _shown(characters[: min(starts)])
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = characters[len(text) - keep :]
        return _shown(characters[: len(text) - keep])

    def finish(self) -> str:
        """What was held back and proved to be no stop string."""
        held, self._held = self._held, []
        return _shown(held)


def _shown(characters: Iterable[tuple[str, bool]]) -> str:
    return "".join(c for c, hidden in characters if not hidden)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
