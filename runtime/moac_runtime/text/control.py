"""Control tokens spelt in a conversation: the template's act, those in a message are text.

A template writes a conversation as one text, in which `<|im_end|>` of a message looks like its
own. So where a message spells a control token the conversation is rendered again with a character
of each such place exchanged for one that occurs nowhere: what the library still finds in there is
the template's own. That is then encoded by a copy of the tokenizer whose control tokens have names
that occur nowhere either, written where the template's own stand; the rest is ordinary text.

Control tokens are those that the checkpoint flags as special, those that end an answer, and other
added tokens that the template itself spells (`<tool_call>`, `</think>`), as in transformers'
`sanitize_control_tokens`. The latter are shown in answers and sent back with them, and so remain
what they were in messages of the assistant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models

from moac_runtime.errors import UsageError
from moac_runtime.text.messages import REASONING

Messages = list[dict[str, Any]]

_SPOKEN = ("content", *REASONING)
_WORD = re.compile(r"[\w.-]+")
# Symbols and letters that have no case, are no space and are let be by JSON and normalisers.
_MARKS = range(0x2801, 0x2900)  # Braille
_OPENERS = range(0xA000, 0xA48D)  # Yi


@dataclass(frozen=True, slots=True)
class Found:
    """A control token in a text: its characters `[start, end)`, white space it takes included."""

    start: int
    end: int
    token: str


class ControlTokens:
    """The control tokens of one tokenizer and its template.

    `ends`: ids that end an answer. `named`: tokens the template knows by name. `written`: the
    text that stands in the template itself.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        ends: Collection[int],
        named: Collection[str],
        written: Iterable[str],
    ) -> None:
        added = backend.get_added_tokens_decoder()
        usable = {i: token for i, token in added.items() if not token.content.isspace()}
        texts = tuple(written)
        self._backend = backend
        self._strict = frozenset(
            token.content
            for i, token in usable.items()
            if token.special or i in ends or token.content in named
        )
        self._all = self._strict | {
            token.content
            for token in usable.values()
            if any(token.content in text for text in texts)
        }
        self._flags = {token.content: (token.lstrip, token.rstrip) for token in usable.values()}
        normalise = _normalise(backend, any(token.normalized for token in usable.values()))
        written = (*texts, *named)
        self._edges = {one: _Edges(one, normalise, written) for one in (self._strict, self._all)}
        self._finder = _finder(backend, [added[i] for i in sorted(added)])
        self._spelt = {i: token for token, i in self._finder.get_vocab().items()}
        self._renamed: dict[str, _Renamed] = {}

    def encode(
        self, text: str, messages: Messages, render: Callable[[Messages], str], *, source: str
    ) -> list[int]:
        """Token ids of `text`, which `render` made of `messages` by the template `source`.

        The ids are the tokenizer's own where no message spells a control token. Raises UsageError
        where the template treats such a message otherwise than one that does not.
        """
        marks = _Marks(json.dumps(messages, ensure_ascii=False) + source)
        marked = [self._marked_message(message, marks) for message in messages]
        if marked == messages:
            return self._plain(text)
        shown = self._render_marked(marked, render, marks)
        own, acting = self._find(shown, self._all), self._find(text, self._all)
        if marks.restore(shown) != text:
            if marks.whole or [one.token for one in own] != [one.token for one in acting]:
                raise _unclear(marks)
            return self._plain(text)
        return self._plain(text) if own == acting else self._named(text, own)

    def _plain(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _named(self, text: str, own: Sequence[Found]) -> list[int]:
        """Ids of `text` with control tokens at `own` alone."""
        opener = next(_absent(_OPENERS, text))
        if opener not in self._renamed:
            self._renamed = {opener: _Renamed.of(self._backend, sorted(self._all), opener)}
        renamed = self._renamed[opener]
        return renamed.encode(self._pieces(text, own, renamed.names))

    def _pieces(self, text: str, own: Sequence[Found], names: Mapping[str, str]) -> Iterator[str]:
        at = 0
        for one in own:
            start, end = self._extent(text, one)
            yield text[at:start]
            yield names[one.token]
            at = end
        yield text[at:]

    def _extent(self, text: str, one: Found) -> tuple[int, int]:
        """Where the token itself stands, without white space that it takes from its sides."""
        before, after = self._flags[one.token]
        found = text[one.start : one.end]
        start = one.start + (len(found) - len(found.lstrip()) if before else 0)
        return start, one.end - (len(found) - len(found.rstrip()) if after else 0)

    def _render_marked(
        self, marked: Messages, render: Callable[[Messages], str], marks: _Marks
    ) -> str:
        try:
            return render(marked)
        except Exception:  # it rendered the very messages without marks
            raise _unclear(marks) from None

    def _find(self, text: str, wanted: Collection[str]) -> list[Found]:
        encoding = self._finder.encode(text, add_special_tokens=False)
        spelt = [self._spelt[i] for i in encoding.ids]
        found = zip(spelt, encoding.offsets, strict=True)
        return [Found(*place, token) for token, place in found if token in wanted]

    def _marked_message(self, message: dict[str, Any], marks: _Marks) -> dict[str, Any]:
        wanted = self._strict if message["role"] == "assistant" else self._all

        def mark(value: Any, key: str) -> Any:
            if isinstance(value, str):
                return self._marked(value, key, wanted, marks)
            if isinstance(value, dict):
                return {mark(k, "key"): mark(v, "value") for k, v in value.items()}
            return [mark(item, "value") for item in value] if isinstance(value, list) else value

        return {mark(key, "key"): mark(value, key) for key, value in message.items()}

    def _marked(self, text: str, key: str, wanted: frozenset[str], marks: _Marks) -> str:
        """`text` with a mark in every control token, and where one may begin, end or go through.

        A word that is no part of what is said is let be at its edges, and as a role altogether:
        templates compare such words, and make control tokens of them (`'<|' + role + '|>'`).
        """
        word = key not in _SPOKEN and _WORD.fullmatch(text) is not None
        if word and key == "role":
            return text
        while found := self._find(text, wanted):  # a mark can bare a token that overlapped
            marks.whole += [one.token for one in found]
            text = marks.put(text, [self._extent(text, one)[0] for one in found])
        return text if word else self._edges[wanted].mark(text, marks)


class _Marks:
    """Characters that stand for others: one for each, found neither in `taken` nor elsewhere."""

    def __init__(self, taken: str) -> None:
        self._free = _absent(_MARKS, taken)
        self._of: dict[str, str] = {}
        self.whole: list[str] = []  # the control tokens that a message spells in full

    def put(self, text: str, places: Iterable[int]) -> str:
        """`text` with its characters at `places` exchanged."""
        characters = list(text)
        for at in places:
            characters[at] = self._mark(characters[at])
        return "".join(characters)

    def _mark(self, character: str) -> str:
        if character not in self._of:
            self._of[character] = next(self._free)
        return self._of[character]

    def restore(self, text: str) -> str:
        """`text` as it was before."""
        return text.translate({ord(mark): char for char, mark in self._of.items()})


def _absent(codes: Iterable[int], text: str) -> Iterator[str]:
    """Characters that `text` does not hold."""
    yield from (chr(code) for code in codes if chr(code) not in text)
    raise UsageError(
        "the conversation spells a control token and holds every character that could stand in "
        "for it; shorten it, or give --parse-special (parse_special=True) to let it act"
    )


class _Edges:
    """Where what a template writes beside a text may complete one of `tokens`."""

    def __init__(
        self, tokens: Collection[str], normalise: Callable[[str], str], written: Iterable[str]
    ) -> None:
        self._normalise = normalise
        forms = {form for text in written for form in (text, normalise(text)) if form}
        self._before, self._after = {text[-1] for text in forms}, {text[0] for text in forms}
        self._tokens = {*tokens, *map(normalise, tokens)}
        self._longest = max(map(len, self._tokens), default=0)
        self._heads = {token[:n] for token in self._tokens for n in range(1, len(token))}
        self._tails = {token[n:] for token in self._tokens for n in range(1, len(token))}

    def mark(self, text: str, marks: _Marks) -> str:
        """A mark on the first and the last character of `text` that is seen where that may be."""
        first = self._first_seen(text, range(len(text)))
        last = self._first_seen(text, reversed(range(len(text))))
        if first is None or last is None:
            return text
        forms = self._forms(text)
        reach = range(1, self._longest)
        places = set()
        if any(one[-n:] in self._heads for one in forms for n in reach) or self._within(forms):
            places.add(last)
        if any(one[:n] in self._tails for one in forms for n in reach):
            places.add(first)
        return marks.put(text, places)

    def _first_seen(self, text: str, places: Iterable[int]) -> int | None:
        """The first of `places` whose character stays: white space and others may be dropped.

        What a normaliser drops a template may escape, and would not escape its mark.
        """
        return next(
            (at for at in places if not text[at].isspace() and self._normalise(text[at])), None
        )

    def _forms(self, text: str) -> set[str]:
        """What a template may make of `text`, and a tokenizer of that."""
        found = {text, text.lstrip(), text.rstrip(), text.strip()}
        return found | {self._normalise(one) for one in found}

    def _within(self, forms: Collection[str]) -> bool:
        """Whether the template writes both what stands before and after a text in a token."""
        return any(
            token[at - 1] in self._before and token[at + len(one)] in self._after
            for one in forms
            if one
            for token in self._tokens
            for at in range(1, len(token) - len(one))
            if token.startswith(one, at)
        )


def _unclear(marks: _Marks) -> UsageError:
    spelt = f"{marks.whole[0]!r}" if marks.whole else "the beginning or end of a control token"
    return UsageError(
        f"a message spells {spelt}, and the chat template treats it otherwise than text; take it "
        "out of the message, or give --parse-special (parse_special=True) to let it act"
    )


def _normalise(backend: tokenizers.Tokenizer, wanted: bool) -> Callable[[str], str]:
    """What the tokenizer makes of a text before it looks for tokens, where it does that first."""
    normaliser = backend.normalizer if wanted else None
    return str if normaliser is None else normaliser.normalize_str


def _finder(
    backend: tokenizers.Tokenizer, added: Sequence[tokenizers.AddedToken]
) -> tokenizers.Tokenizer:
    """A tokenizer without a vocabulary: it finds added tokens, by the library's own rules."""
    finder = tokenizers.Tokenizer(models.BPE())
    if backend.normalizer is not None:
        finder.normalizer = backend.normalizer
    finder.add_tokens(list(added))
    return finder


@dataclass(frozen=True, slots=True)
class _Renamed:
    """A copy of a tokenizer with the same ids. `names`: what its control tokens are called."""

    backend: tokenizers.Tokenizer
    names: Mapping[str, str]

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer, tokens: Sequence[str], opener: str) -> _Renamed:
        digits = len(str(len(tokens)))  # of one width, so that no name begins another
        names = {token: f"{opener}{i:0{digits}}" for i, token in enumerate(tokens)}
        document = json.loads(backend.to_str())
        for token in document["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename_model(document["model"], names)
        renamed = tokenizers.Tokenizer.from_str(json.dumps(document, ensure_ascii=False))
        return cls(renamed, names)

    def encode(self, pieces: Iterable[str]) -> list[int]:
        return list(self.backend.encode("".join(pieces), add_special_tokens=False).ids)


def _rename_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """The model's own pieces too: it would find a control token among them in plain text."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        model["merges"] = [[a, b] for a, b in model["merges"] if not {a, b, a + b} & names.keys()]
    unknown = model.get("unk_token")
    if unknown is not None:
        model["unk_token"] = names.get(unknown, unknown)
