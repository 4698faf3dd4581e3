"""A conversation that goes on from the cache of its last turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from moac_runtime.engine.capacity import Path
from moac_runtime.engine.chat_file import read_chat, write_chat
from moac_runtime.engine.engine import Engine
from moac_runtime.engine.request import Active, Request
from moac_runtime.engine.sampling import SamplingOptions
from moac_runtime.engine.turn import Turn
from moac_runtime.errors import UsageError
from moac_runtime.text.boundaries import message_ends
from moac_runtime.text.messages import is_blank, text_of

if TYPE_CHECKING:
    from moac_runtime.engine.model import Model


class Chat:
    """Turns of one conversation with `model`; made by `Model.chat`.

    A turn reads what is new. `messages`: what was said so far. Where the conversation outgrows
    its row, the row grows: what it had dropped stays dropped.
    """

    def __init__(
        self,
        model: Model,
        engine: Engine,
        *,
        system: str | None,
        options: SamplingOptions,
        open_ended: bool,
    ) -> None:
        self._model, self._engine = model, engine
        self.options = options
        self.open_ended = open_ended
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.last: Turn | None = None
        self._path: Path | None = None
        self.reset(system=system)

    def reset(self, *, system: str | None = None) -> None:
        """Begin anew; `system` replaces the system message, None leaves it as it is."""
        if system is not None:
            self.system = text_of(system, "the system message")
        self.messages = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.last, self._path = None, None

    def stream(self, text: str) -> ChatStream:
        """The answer to `text`, piece by piece; it joins the conversation once it has ended.

        Raises UsageError for blank text, and where the conversation has no room left.
        """
        if is_blank(text_of(text, "the message")):
            raise UsageError("the message is blank; give some text")
        asked = [*self.messages, {"role": "user", "content": text}]
        tokens = self._model.tokenizer.encode_chat(asked)
        request = Request(
            tokens=tuple(tokens),
            options=self.options,
            open_ended=self.open_ended,
            marks=message_ends(self._model.tokenizer, asked, tokens),
            came_from=self._path,
        )
        return ChatStream(self, self._engine, self._engine.submit(request), asked)

    def say(self, text: str) -> str:
        """The whole answer to `text`; raises as `stream`."""
        return "".join(self.stream(text))

    def set(self, **changes: Any) -> None:
        """Change sampling from the next turn on. Raises UsageError for a wrong value."""
        self.options = replace(self.options, **changes)
        self.open_ended = self.open_ended and "max_tokens" not in changes

    def save(self, path: str | FilePath) -> None:
        """Write the conversation and the cache of its last turn to a safetensors file."""
        write_chat(FilePath(path), self._model, self._engine, self.messages, self._path)

    def load(self, path: str | FilePath) -> None:
        """Go on from a file that `save` wrote with the same package. Raises MoacError."""
        self.messages, self._path = read_chat(FilePath(path), self._model, self._engine)
        first = self.messages[0] if self.messages else {}
        self.system = first["content"] if first.get("role") == "system" else None
        self.last = None

    def _ended(self, asked: list[dict[str, Any]], active: Active) -> None:
        """Take a turn into the conversation, an interrupted one with what it has."""
        self.messages = [*asked, {"role": "assistant", "content": active.answer.text}]
        self.last = Turn.of(active, self._engine)
        self._path = active.path or self._path


class ChatStream(Iterator[str]):
    """The answer of one turn as it comes."""

    def __init__(
        self, chat: Chat, engine: Engine, active: Active, asked: list[dict[str, Any]]
    ) -> None:
        self._chat, self._engine, self._active, self._asked = chat, engine, active, asked
        self._ended = False

    def __next__(self) -> str:
        while not self._active.done:
            if piece := self._active.answer.take():
                return piece
            self._engine.step()
        if self._active.error is not None:
            raise self._active.error
        self._finish()
        if piece := self._active.answer.take():
            return piece
        raise StopIteration

    def interrupt(self) -> None:
        """End the answer with what it has."""
        self._engine.cancel(self._active)
        self._finish()

    def _finish(self) -> None:
        if not self._ended:
            self._ended = True
            self._chat._ended(self._asked, self._active)
