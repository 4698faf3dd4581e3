"""How a checkpoint's tokenizer writes a conversation: its chat template, or a plain prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moac.checkpoint.template import render_chat, special_tokens
from moac_runtime.errors import CheckpointError, MoacError, UsageError
from moac_runtime.text.messages import Message, text_of
from moac_runtime.text.tokenizer import Tokenizer

_ANSWER = "MOACANSWER"
_PLAIN_OPENING = "{text}\nAnswer:"
_PLAIN_TURN = "\n\nQuestion: {text}\nAnswer:"


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Token ids of user turns. `tokenizer`: a transformers tokenizer.

    With a chat template, a turn ends with the template's generation prompt; without one, text is
    followed by `Answer:` and a line end closes the answer.
    """

    tokenizer: Any

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint brings a chat template."""
        return bool(self.tokenizer.chat_template)

    def opening_text(self, text: str) -> str:
        """A conversation's first user turn, as the text that is tokenized."""
        if self.has_template:
            return self.render([{"role": "user", "content": text}])
        return _PLAIN_OPENING.format(text=text)

    def opening(self, text: str) -> list[int]:
        """A conversation's first user turn, up to where the answer starts."""
        return self.encode(self.opening_text(text), opens=True)

    def turn(self, text: str) -> list[int]:
        """A later user turn: everything between the last answer and the next one."""
        if not self.has_template:
            return self.encode(_PLAIN_TURN.format(text=text))
        talk = [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": text},
        ]
        before, found, after = self.render(talk).partition(_ANSWER)
        if not found:
            raise CheckpointError(
                "the checkpoint's chat template drops an assistant message that a later turn "
                f"follows (it rendered {before!r}); calibrate with a template that keeps it"
            )
        return self.encode(after)

    def prompt(self, text: str) -> list[int]:
        """A user's own text as the first turn; control tokens that it spells are text."""
        text_of(text, "the prompt")
        if self.has_template:
            return self.messages([{"role": "user", "content": text}])
        return self.opening(text)

    def messages(self, messages: Sequence[Message]) -> list[int]:
        """A user's own conversation up to where the next answer starts, as a package reads it.

        Raises UsageError where the checkpoint has no template or refuses the conversation.
        """
        if not self.has_template:
            raise UsageError(
                'the checkpoint has no chat template, so "messages" cannot be rendered; '
                'give "prompt" instead'
            )
        try:
            return self._packaged().encode_chat(messages)
        except UsageError:
            raise
        except MoacError as error:
            raise UsageError(str(error)) from None

    def _packaged(self) -> Tokenizer:
        """The tokenizer as the package will hold it."""
        end = self.tokenizer.eos_token_id
        return Tokenizer(
            backend=self.tokenizer.backend_tokenizer,
            eos_token_ids=frozenset(() if end is None else (end,)),
            special_tokens=special_tokens(self.tokenizer),
            chat_template=self.tokenizer.get_chat_template(),
        )

    def render(self, messages: Sequence[Message]) -> str:
        """The template's text for `messages`, generation prompt included."""
        return render_chat(self.tokenizer, messages)

    def encode(self, text: str, *, opens: bool = False) -> list[int]:
        """Token ids of `text`; `opens` adds what the tokenizer puts before a plain sequence."""
        special = opens and not self.has_template
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
