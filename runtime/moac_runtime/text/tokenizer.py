"""Text to tokens and back: the tokenizer, its chat template, streamed text, stop strings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.package.integrity import REMEDY
from moac_runtime.package.manifest import read_json
from moac_runtime.text.control import ControlTokens
from moac_runtime.text.messages import REASONING, Message, plain_messages, text_of

_UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not a whole character


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
    def read(cls, tokenizer: Path, settings: Path, template: Path | None) -> Tokenizer:
        """From a package's `tokenizer.json`, `generation.json` and chat template, if it has one.

        Raises ArtifactError where a file is unusable.
        """
        found = _read_settings(settings)
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return cls(
            backend=_read_backend(tokenizer),
            eos_token_ids=frozenset(found["eos_token_ids"]),
            special_tokens={name: found[name] for name in names if found.get(name)},
            chat_template=None if template is None else template.read_text(encoding="utf-8"),
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
        self, messages: Sequence[Message], *, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a conversation up to where its answer starts.

        Control tokens that a message spells are text, unless `parse_special` lets them act.
        Raises as `chat`.
        """
        template, plain, now = self._template(), plain_messages(messages), datetime.now()

        def render(chat: Sequence[Message]) -> str:
            return template.render(
                chat, add_generation_prompt=True, special_tokens=self.special_tokens, now=now
            )

        text = text_of(render(plain), "what the chat template writes")
        if parse_special:
            return self.encode(text, special=False)
        control: ControlTokens = self._once("control", self._control_tokens)
        return control.encode(text, plain, render, source=template.source)

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
            written=self._template().literals(),
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

    def stream(self) -> TextStream:
        """A fresh decoder for tokens that arrive one by one."""
        return TextStream(self)


def _read_settings(path: Path) -> dict[str, Any]:
    settings = read_json(path, path.name)
    tokens = settings.get("eos_token_ids")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise ArtifactError(
            f"{path.name} has eos_token_ids {tokens!r}, expected a list of token ids: {REMEDY}"
        )
    return settings


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ArtifactError(
            f"{path.name} is no tokenizer this version reads ({error}): {REMEDY}"
        ) from None
    # A file saved while truncating or padding would silently cut prompts.
    backend.no_truncation()
    backend.no_padding()
    return backend


class TextStream:
    """Turns tokens into text as they arrive, whole characters only.

    `tokenizers.decoders.DecodeStream` does the same but raises once a byte-fallback model writes
    bytes that are no character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
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


class ChatTemplate:
    """A checkpoint's Jinja template, rendered in a sandbox the way transformers renders it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # of Jinja's parser, of Python's compiler behind it
            raise ArtifactError(
                f"the package's chat template is not valid Jinja ({_one_line(error)}); "
                "use --raw (raw=True) to send the prompt as is"
            ) from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        special_tokens: Mapping[str, str],
        now: datetime | None = None,
    ) -> str:
        """A conversation of `plain_messages` as text; `now`: the time that templates are told.

        Raises MoacError where the template refuses it.
        """
        try:
            text: str = self._template.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=(now or datetime.now()).strftime,
                **special_tokens,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise MoacError(
                f"the chat template refused this conversation ({_one_line(error)}); "
                "change the messages, or use --raw (raw=True) to send the prompt as is"
            ) from None
        return text

    def literals(self) -> list[str]:
        """The texts that stand in the template: what it writes, and its string constants."""
        from jinja2 import nodes

        tree = self._environment.parse(self.source)
        written = [node.data for node in tree.find_all(nodes.TemplateData)]
        constants = [node.value for node in tree.find_all(nodes.Const)]
        return written + [value for value in constants if isinstance(value, str)]


def _with_reasoning(message: Message) -> dict[str, Any]:
    """A message with its reasoning under the names in use."""
    for name in REASONING:
        if message.get(name) is not None:
            thought = message[name]
            return {"thinking": thought, **message, "reasoning_content": thought}
    return dict(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _environment() -> Any:
    """The sandbox of `transformers.utils.chat_template_utils`, the names it offers included."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_tag(), jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        dict=_TemplateDict(),
        namespace=_namespace(),
    )
    return environment


def _generation_tag() -> Any:
    """`{% generation %} ... {% endgeneration %}` marks answers for training: here, plain text."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 - the name and type Jinja asks for

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    return GenerationTag


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which templates do not expect.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _TemplateDict:
    """`dict` without the attributes through which a template could leave the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _namespace() -> Any:
    """Jinja's `namespace`, refusing names that begin with an underscore."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot store the underscored name {name!r}")

    class TemplateNamespace(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            # `self` may itself be a stored name, as in Jinja's class.
            self, attributes = args[0], dict(*args[1:], **kwargs)
            for name in attributes:
                check(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            Namespace.__setitem__(self, name, value)

    return TemplateNamespace
