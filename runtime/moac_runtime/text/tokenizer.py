"""Text and conversations to tokens, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import tokenizers

from moac_runtime.errors import ArtifactError, UsageError
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.integrity import REMEDY
from moac_runtime.package.limits import MOST_TOKENS
from moac_runtime.package.manifest import json_object
from moac_runtime.text.control import ControlTokens
from moac_runtime.text.messages import Message, plain_messages, text_of
from moac_runtime.text.template import ChatTemplate

GENERATION = "tokenizer/generation.json"
_TOKENS = "tokenizer/tokenizer.json"
_TEMPLATE = "tokenizer/chat_template.jinja"
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A package's tokenizer.

    `eos_token_ids`: every token that ends an answer. `special_tokens`: the names a chat template
    may use (`bos_token`, `eos_token`, ...). `chat_template`: Jinja source, None where the
    checkpoint has none.
    """

    backend: tokenizers.Tokenizer
    eos_token_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    chat_template: str | None
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def packaged(cls, artifact: Artifact) -> Tokenizer:
        """A package's own. Raises ArtifactError."""
        template = artifact.read(_TEMPLATE) if _TEMPLATE in artifact.files else None
        return cls.parsed(artifact.read(_TOKENS), artifact.read(GENERATION), template)

    @classmethod
    def parsed(cls, tokenizer: bytes, settings: bytes, template: bytes | None) -> Tokenizer:
        """From the contents of `tokenizer.json`, `generation.json` and a chat template, if any.

        Raises ArtifactError where one is unusable.
        """
        found = _parse_settings(settings)
        return cls(
            backend=_parse_backend(tokenizer),
            eos_token_ids=frozenset(found["eos_token_ids"]),
            special_tokens={name: found[name] for name in SPECIAL_TOKENS if found.get(name)},
            chat_template=None if template is None else _parse_template(template),
        )

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`; `special` adds what the checkpoint puts around plain text (BOS).

        Control tokens that `text` spells act as such. Every character is text, control characters
        and NUL too. Raises UsageError where `text` is no Unicode text (undecodable bytes of a
        command line).
        """
        text_of(text, "the prompt")
        return list(self.backend.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special tokens left out."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def spelling(self, token: int) -> str:
        """The text of `token` where `decode` leaves it out or it ends an answer, else ""."""
        hidden: dict[int, str] = self._once("hidden", self._hidden_tokens)
        return hidden.get(token, "")

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """`messages` as the checkpoint's chat template writes them; encode with `special=False`.

        Raises UsageError where the package has no template or a message is not what
        `plain_messages` takes, and MoacError where the template refuses the conversation.
        """
        return self._template().render(
            plain_messages(messages),
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        parse_special: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation up to where its answer starts.

        Control tokens that a message spells are text, unless `parse_special` lets them act.
        `tools` and `variables` are the template's. Raises as `chat`.
        """
        template, plain, now = self._template(), plain_messages(messages), datetime.now()

        def render(chat: Sequence[Message]) -> str:
            return template.render(
                chat,
                add_generation_prompt=add_generation_prompt,
                special_tokens=self.special_tokens,
                now=now,
                tools=tools,
                variables=variables,
            )

        text = text_of(render(plain), "what the chat template writes")
        if parse_special:
            return self.encode(text, special=False)
        control: ControlTokens = self._once("control", self._control_tokens)
        return control.encode(text, plain, render, source=template.source)

    @property
    def takes_tools(self) -> bool:
        """Whether the package has a chat template that writes tools."""
        return self.chat_template is not None and self._template().takes_tools

    def _template(self) -> ChatTemplate:
        source = self.chat_template
        if source is None:
            raise UsageError(
                "this package has no chat template; use --raw (raw=True) to send the prompt as is"
            )
        template: ChatTemplate = self._once("template", lambda: ChatTemplate(source))
        return template

    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(
            self.backend,
            ends=self.eos_token_ids,
            named=frozenset(self.special_tokens.values()),
            written=self._template().literals,
        )

    def _hidden_tokens(self) -> dict[int, str]:
        added = self.backend.get_added_tokens_decoder()
        ends = {i: self.backend.decode([i], skip_special_tokens=False) for i in self.eos_token_ids}
        return ends | {
            i: token.content for i, token in added.items() if token.special or i in ends
        }

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def _parse_settings(content: bytes) -> dict[str, Any]:
    settings = json_object(content, GENERATION)
    _check_settings(settings, GENERATION)
    return settings


def _check_settings(settings: Mapping[str, Any], name: str) -> None:
    """Ids that a tokenizer can be asked for, and texts where a template is given texts."""
    ends = settings.get("eos_token_ids")
    if not isinstance(ends, list) or not all(map(_is_token, ends)):
        raise ArtifactError(
            f"{name} has eos_token_ids {ends!r:.60}, expected a list of token ids: {REMEDY}"
        )
    for key in SPECIAL_TOKENS:
        if not isinstance(found := settings.get(key), str | None):
            raise ArtifactError(f"{name} has {key} {found!r:.60}, expected a text: {REMEDY}")


def _is_token(found: object) -> bool:
    return type(found) is int and 0 <= found < MOST_TOKENS


def _parse_template(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{_TEMPLATE} is not UTF-8 text ({error}): {REMEDY}") from error


def _parse_backend(content: bytes) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise ArtifactError(
            f"{_TOKENS} is no tokenizer this version reads ({error}): {REMEDY}"
        ) from None
    # A file saved while truncating or padding would silently cut prompts.
    backend.no_truncation()
    backend.no_padding()
    return backend
