"""A GGUF file's tokenizer, built from the file's own fields to give the original's ids.

The file has no `tokenizer.json`. Its fields name one of two kinds: sentencepiece's BPE over text
whose spaces are written `▁`, or BPE over bytes, which differs by how text is split before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from moac.checkpoint.families.options import refuse
from moac.checkpoint.gguf_config import token_id
from moac.checkpoint.gguf_fields import Fields
from moac_runtime.errors import CheckpointError

_SPACE = "▁"
# Token types of the format; the sixth are bytes.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)
_MATCHED = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}  # in text; whether special

_MOST_CUTS = 10**8  # characters to look up; a large vocabulary has a tenth of them

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _ByteLevel:
    """What the name of a pre-tokenizer stands for. `split`: a regex, None for GPT-2's own.

    `whole_words`: a word that is a token stays one, whatever its merges. `bos`: whether a text
    begins with that token where the file does not say.
    """

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


_LLAMA3 = _ByteLevel(split=_SPLIT % "{1,3}", whole_words=True, bos=True)
_BYTE_LEVEL: Mapping[str, _ByteLevel] = {
    "gpt-2": _ByteLevel(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _ByteLevel(split=_SPLIT % "", nfc=True),
    "smollm": _ByteLevel(digits=True),
}


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The listed tokens: `ids` of those that are in use, `types` and `scores` by id."""

    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] | None
    ids: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        # Rows that only pad the embedding are no tokens of the original.
        used = [i for i, kind in enumerate(self.types) if kind != _UNUSED]
        object.__setattr__(self, "ids", {self.tokens[i]: i for i in used})
        if len(self.ids) < len(used):
            twice = next(self.tokens[i] for i in used if self.ids[self.tokens[i]] != i)
            raise ValueError(f"the token {twice!r:.60} is listed twice")


def check_tokenizer_fields(fields: Fields) -> None:
    """Refuse a kind of tokenizer, or a field of one, that is not served."""
    kind = fields.text("tokenizer.ggml.model", None)
    if kind not in ("llama", "gpt2"):
        raise refuse("GGUF tokenizer", kind, "gpt2 (byte-level BPE), llama (sentencepiece)")
    unserved = ["add_sep_token", "remove_extra_whitespaces", "precompiled_charsmap"]
    if kind == "gpt2":
        name = fields.text("tokenizer.ggml.pre", None)
        if name not in _BYTE_LEVEL:
            served = f"{', '.join(_BYTE_LEVEL)}; use the original checkpoint"
            raise refuse("GGUF pre-tokenizer", name, served)
        unserved.append("add_space_prefix")
    for name in unserved:
        value = fields.values.get(f"tokenizer.ggml.{name}")
        if value:
            served = "a GGUF file without it; use the original checkpoint"
            raise refuse(f"tokenizer.ggml.{name} =", value, served)


def gguf_tokenizer(fields: Fields) -> Any:
    """The tokenizer in transformers, chat template and all. Raises CheckpointError."""
    from transformers import PreTrainedTokenizerFast

    sentencepiece = fields.text("tokenizer.ggml.model") == "llama"
    named = _named_tokens(fields, sentencepiece=sentencepiece)
    template = _chat_template(fields)
    try:
        runs = _has_runs(fields)
        vocabulary = _vocabulary(fields, named.values(), runs=runs)
        special = {name: vocabulary.tokens[i] for name, i in named.items() if i is not None}
        make = _sentencepiece if sentencepiece else _byte_level
        backend = make(fields, vocabulary, special.get("unk_token"))
        _add_tokens(backend, vocabulary, [*special.values()], runs=runs)
        _add_ends(backend, fields, special, sentencepiece=sentencepiece)
        made: Any = PreTrainedTokenizerFast
        return made(
            tokenizer_object=backend,
            chat_template=template,
            clean_up_tokenization_spaces=False,
            **special,
        )
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(
            f"the tokenizer of {fields.path} is not usable "
            f"({' '.join(str(error).split())[:300]}); convert the original checkpoint again"
        ) from None


def _has_runs(fields: Fields) -> bool:
    """Whether a text is its own pieces, so that a run of spaces in it may be a token."""
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    return fields.text("tokenizer.ggml.model") == "llama" and not prefix


def _vocabulary(fields: Fields, named: Iterable[int | None], *, runs: bool) -> _Vocabulary:
    """`runs`: whether tokens of spaces alone are pieces, which converters wrote as text."""
    tokens = fields.texts("tokenizer.ggml.tokens")
    if runs:
        tokens = [t if t.strip(" ") else t.replace(" ", _SPACE) for t in tokens]
    types = [*(fields.numbers("tokenizer.ggml.token_type", None) or [_NORMAL] * len(tokens))]
    scores = fields.numbers("tokenizer.ggml.scores", None)
    for name, found in (("token types", types), ("scores", scores)):
        if found is not None and len(found) != len(tokens):
            raise ValueError(f"it lists {len(tokens)} tokens and {len(found)} {name}")
    for i in named:
        if i is not None and types[i] == _UNUSED:
            types[i] = _CONTROL
    return _Vocabulary(tokens, types, scores)


def _named_tokens(fields: Fields, *, sentencepiece: bool) -> dict[str, int | None]:
    """Ids by their names in transformers; sentencepiece's own where the file names none."""
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {name: token_id(fields, key) for name, key in keys.items()}
    if sentencepiece:
        types = fields.numbers("tokenizer.ggml.token_type", None) or []
        for name, default in (("unk_token", 0), ("bos_token", 1), ("eos_token", 2)):
            key = f"tokenizer.ggml.{keys[name]}_token_id"
            # a type of its own, or no types at all
            if key not in fields and types[default : default + 1] != [_NORMAL]:
                named[name] = default
    return named


def _sentencepiece(fields: Fields, vocabulary: _Vocabulary, unknown: str | None) -> Tokenizer:
    """As the `tokenizer.json` of Llama 2 and Mistral: each piece of text between special tokens
    gets a space before it, and unknown characters are spelt in bytes.
    """
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    merges = fields.texts("tokenizer.ggml.merges", None)
    backend = Tokenizer(
        models.BPE(
            vocab=dict(vocabulary.ids),
            merges=_scored_merges(vocabulary) if merges is None else _pairs(merges),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: Any = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    )
    decoding: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*decoding, *([decoders.Strip(" ", 1, 0)] * prefix)])
    return backend


def _byte_level(fields: Fields, vocabulary: _Vocabulary, unknown: str | None) -> Tokenizer:
    kind = _BYTE_LEVEL[fields.text("tokenizer.ggml.pre")]
    merges = _pairs(fields.texts("tokenizer.ggml.merges"))
    backend = Tokenizer(
        models.BPE(vocab=dict(vocabulary.ids), merges=merges, ignore_merges=kind.whole_words)
    )
    if kind.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if kind.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if kind.split is not None:
        steps.append(pre_tokenizers.Split(Regex(kind.split), behavior="isolated"))
    own = kind.split is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in merges]
    wrong = next((merge for merge in pairs if len(merge) != 2), None)
    if wrong is not None:
        raise ValueError(f"the merge {' '.join(wrong)!r:.60} is not two pieces")
    return [(left, right) for left, right in pairs]


def _scored_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two, the highest score first, as sentencepiece merges.

    Of one score the longer left piece comes first, which is the order of converted originals.
    Converters that knew no scores wrote the same for all; then ids are in the order of merges.
    """
    pieces = {
        token: i for token, i in vocabulary.ids.items() if token and vocabulary.types[i] == _NORMAL
    }
    scores = vocabulary.scores
    if scores is None or len({scores[i] for i in pieces.values()}) == 1:
        scores = [-i for i in range(len(vocabulary.tokens))]
    if sum(len(token) ** 2 for token in pieces) > _MOST_CUTS:
        raise ValueError("its tokens are too long to be put together of two")
    found = [
        (scores[i], cut, len(token) - cut, token)
        for token, i in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(token[:cut], token[cut:]) for _, cut, _, token in found]


def _add_tokens(
    backend: Tokenizer, vocabulary: _Vocabulary, named: Sequence[str], *, runs: bool
) -> None:
    """Tokens that are found in text before anything else, each under the id it has.

    `runs`: whether those of spaces alone are found among the text's pieces instead.
    """
    kinds = dict(enumerate(vocabulary.types))
    special = {vocabulary.tokens[i]: _MATCHED[k] for i, k in kinds.items() if k in _MATCHED}
    special.update(dict.fromkeys(named, True))
    added = [
        AddedToken(token, special=special[token], normalized=runs and not token.strip(_SPACE))
        for token in sorted(special, key=lambda token: vocabulary.ids[token])
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])


def _add_ends(
    backend: Tokenizer, fields: Fields, special: Mapping[str, str], *, sentencepiece: bool
) -> None:
    """What a text begins and ends with, where the file or the kind of tokenizer says so."""
    usual = sentencepiece or _BYTE_LEVEL[fields.text("tokenizer.ggml.pre")].bos
    added = {
        "bos_token": fields.flag("tokenizer.ggml.add_bos_token", usual and "bos_token" in special),
        "eos_token": fields.flag("tokenizer.ggml.add_eos_token", False),
    }
    for name, asked in added.items():
        if asked and name not in special:
            raise ValueError(f"it says add_{name} and names no {name}")
    first, last = ([special[name]] if asked else [] for name, asked in added.items())
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*first, *last}],
    )


def _chat_template(fields: Fields) -> str | None:
    """The template without a name; others are for uses that the compiler has not."""
    template: str | None = fields.text("tokenizer.chat_template", None)
    named = [name for name in fields.values if name.startswith("tokenizer.chat_template.")]
    if template is None and named:
        raise CheckpointError(
            f"{fields.path} holds {', '.join(sorted(named))} and no tokenizer.chat_template, the "
            "one that is used; convert the original checkpoint again with a default template"
        )
    return template
