"""A GGUF's tokenizer gives the ids of the tokenizer.json that the file was converted from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf_files import byte_level_fields, write_gguf
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.convert_slow_tokenizer import generate_merges

from moac.checkpoint import open_checkpoint
from moac.checkpoint.gguf_fields import Fields
from moac.checkpoint.gguf_tokenizer import gguf_tokenizer
from moac_runtime.errors import CheckpointError

SPACE = "▁"
TEXT = (
    "The leading key is [INST] hidden [/INST] in the text, it's foo bar at 12 345.\n\n\tIT'S "
    "two  three   four    [a] [b] é e\u0301 naïve über 한국어 🙂 aaaa aaa"
)
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>")
PLAIN = ("<think>", "<tool call>")
PIECES = st.one_of(
    st.sampled_from([*SPECIAL, *PLAIN, *TEXT.split(" "), " ", "  ", "   ", "\n", "\r\n", "\t"]),
    st.sampled_from(
        [SPACE, "[INST]", " [INST]", "<0x0A>", "e\u0301", "\u2028", "\u00a0", "Hello"]
    ),
    st.text(max_size=4),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)
# What the kinds differ in, whatever hypothesis finds.
KNOWN = (
    *("<s>[INST] hi", "  two", " lead", "foo</s>bar", "foo</s> bar", "", " ", "\n", "</s>"),
    *("e\u0301", "\u00e9", "it's", "12345", "a  1", SPACE, "<think>x", "\U0001f642", "<0x0A>"),
)


def added(*, special: bool, tokens: tuple[str, ...]) -> list[AddedToken]:
    return [AddedToken(token, special=special, normalized=False) for token in tokens]


@dataclass(frozen=True, slots=True)
class Pair:
    """An original tokenizer and the fields, after `tokenizer.`, of a GGUF made from it."""

    original: Tokenizer
    fields: Mapping[str, Any]

    def opened(self, **changes: Any) -> Any:
        values = {**self.fields, **{f"ggml.{name}": value for name, value in changes.items()}}
        named = {f"tokenizer.{key}": v for key, v in values.items() if v is not None}
        return gguf_tokenizer(
            Fields(Path("tiny.gguf"), {"general.architecture": "llama", **named})
        )

    def check(self, text: str, **changes: Any) -> None:
        opened = self.opened(**changes)
        backend = opened.backend_tokenizer
        for special in (True, False):
            expected = self.original.encode(text, add_special_tokens=special).ids
            assert opened(text, add_special_tokens=special)["input_ids"] == expected, text
            for skipped in (True, False):
                told = self.original.decode(expected, skip_special_tokens=skipped)
                assert backend.decode(expected, skip_special_tokens=skipped) == told


def types_of(tokens: list[str]) -> list[int]:
    kinds = {**dict.fromkeys(SPECIAL, 3), **dict.fromkeys(PLAIN, 4), "<unk>": 2}
    return [6 if token.startswith("<0x") else kinds.get(token, 1) for token in tokens]


# ---- sentencepiece


@cache
def pieces() -> tuple[str, ...]:
    """Tokens of a BPE over text whose spaces are written as sentencepiece writes them."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=[*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        max_token_length=8,
    )
    tokenizer.train_from_iterator(
        [TEXT, *TEXT.split("."), *(f"[{c}" for c in "abcdefgh")] * 3, trainer
    )
    vocabulary = tokenizer.get_vocab()
    return (*sorted(vocabulary, key=lambda token: vocabulary[token]), SPECIAL[3], *PLAIN)


def scores_of(tokens: list[str], types: list[int]) -> list[float]:
    """As sentencepiece stores them: the earlier a piece was merged, the higher."""
    return [float(-index) if kind == 1 else 0.0 for index, kind in enumerate(types)]


@cache
def sentencepiece(prefix: bool = True, ends: tuple[str, ...] = ("bos",)) -> Pair:
    """Llama 2's and Mistral's tokenizer.json; without `prefix` no space comes before a text."""
    tokens = list(pieces())
    types = types_of(tokens)
    scores = scores_of(tokens, types)
    base = {token: i for i, token in enumerate(tokens) if i < len(tokens) - 3}
    merges = generate_merges(base, {token: scores[i] for token, i in base.items()})
    tokenizer = Tokenizer(
        models.BPE(base, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", SPACE)
    steps: list[Any] = [normalizers.Prepend(SPACE), spaces] if prefix else [spaces]
    tokenizer.normalizer = normalizers.Sequence(steps)
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    tokenizer.add_special_tokens(added(special=True, tokens=SPECIAL))
    tokenizer.add_tokens(added(special=False, tokens=PLAIN))
    single = f"{'<s> ' * ('bos' in ends)}$A{' </s>' * ('eos' in ends)}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fields = {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": tokens,
        "ggml.scores": scores,
        "ggml.token_type": types,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }
    return Pair(tokenizer, fields)


@pytest.mark.parametrize("text", KNOWN)
def test_sentencepiece_on_known_texts(text: str) -> None:
    sentencepiece().check(text)
    sentencepiece(prefix=False).check(text, add_space_prefix=False)


@given(TEXTS)
def test_sentencepiece_on_any_text(text: str) -> None:
    sentencepiece().check(text)
    sentencepiece(prefix=False).check(text, add_space_prefix=False)


def test_what_stands_after_a_special_token_begins_with_a_space() -> None:
    tokens = sentencepiece().fields["ggml.tokens"]
    ids = sentencepiece().opened()("<s>[INST] hi", add_special_tokens=False)["input_ids"]
    assert tokens[ids[1]].startswith(f"{SPACE}[")
    assert "".join(tokens[token] for token in ids) == f"<s>{SPACE}[INST]{SPACE}hi"
    lead = sentencepiece().opened()(" lead")["input_ids"]
    assert "".join(tokens[token] for token in lead[1:]) == f"{SPACE}{SPACE}lead"


def best_pairs(text: str, scores: Mapping[str, float]) -> list[str]:
    """Sentencepiece's BPE, written out: of all neighbours the best, the first of equals."""
    parts = list(text)
    while True:
        found = [
            (scores[parts[i] + parts[i + 1]], -i)
            for i in range(len(parts) - 1)
            if parts[i] + parts[i + 1] in scores
        ]
        if not found:
            return parts
        at = -max(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(st.text(alphabet="theaky []INSTfour345", max_size=24))
def test_merges_follow_the_scores(text: str) -> None:
    fields = sentencepiece().fields
    normal = [i for i, kind in enumerate(fields["ggml.token_type"]) if kind == 1]
    tokens = fields["ggml.tokens"]
    scores = {tokens[i]: fields["ggml.scores"][i] for i in normal}
    expected = best_pairs(SPACE + text.replace(" ", SPACE), scores) if text else []
    known = [part if part in scores else "<unk>" for part in expected]
    ids = sentencepiece().opened()(text, add_special_tokens=False)["input_ids"]
    spelt = [tokens[i] for i in ids if not tokens[i].startswith("<0x")]
    assert spelt == [part for part in known if part != "<unk>"]


@given(TEXTS)
def test_scores_that_are_all_the_same_give_way_to_the_ids(text: str) -> None:
    same = [-1000.0] * len(pieces())
    sentencepiece().check(text, scores=same)
    sentencepiece().check(text, scores=None)


def test_pieces_of_other_types_are_no_merges() -> None:
    """`<0x` + `0A>` are no way to spell a byte, nor is what pads the embedding a token."""
    fields = sentencepiece().fields
    more = ["<0", "x0A>", "<0x", "0A>", "bar[", "[PAD7]"]
    kinds = [1, 1, 1, 1, 5, 5]
    opened = sentencepiece().opened(
        tokens=[*fields["ggml.tokens"], *more],
        token_type=[*fields["ggml.token_type"], *kinds],
        scores=[*fields["ggml.scores"], *([-500.0] * len(more))],
    )
    tokens = [*fields["ggml.tokens"], *more]
    assert "<0x0A>" not in [tokens[i] for i in opened("<0x0A>")["input_ids"]]
    assert opened.convert_tokens_to_ids("[PAD7]") in (None, opened.unk_token_id)
    assert "bar[" not in [tokens[i] for i in opened("bar[")["input_ids"]]


@pytest.mark.parametrize("ends", [(), ("bos",), ("bos", "eos"), ("eos",)])
def test_what_a_text_begins_and_ends_with(ends: tuple[str, ...]) -> None:
    flags = {"add_bos_token": "bos" in ends, "add_eos_token": "eos" in ends}
    for text in ("", "hi", "<s>hi</s>"):
        sentencepiece(ends=ends).check(text, **flags)


def test_a_text_begins_with_bos_where_the_file_does_not_say() -> None:
    opened = sentencepiece().opened(bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    assert opened("hi")["input_ids"][0] == 1
    assert (opened.bos_token, opened.eos_token, opened.unk_token) == ("<s>", "</s>", "<unk>")


RUNS = (*(SPACE * count for count in range(2, 6)), "\n", "\n\n", "\n\n\n", "\t\t", "<table>")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Sentencepiece's own BPE as Gemma's: no prefix, and runs of white space that are tokens."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").write_text("\n".join([*TEXT.split("\n"), *TEXT.split(".")] * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tiny"),
        model_type="bpe",
        vocab_size=420,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        user_defined_symbols=[*RUNS],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tiny.model"))


def converted(model: Any) -> dict[str, Any]:
    """Fields after `tokenizer.`, as llama.cpp's converter writes them for Gemma 3."""
    ids = range(model.get_piece_size())
    kinds = [
        3 if i < 4 else 6 if model.is_byte(i) else 4 if model.id_to_piece(i) in RUNS else 1
        for i in ids
    ]
    pieces = [model.id_to_piece(i) for i in ids]
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [
            piece.replace(SPACE, " ") if kind == 4 else piece
            for piece, kind in zip(pieces, kinds, strict=True)
        ],
        "ggml.scores": [
            -1000.0 if kind in (3, 4) else float(model.get_score(i))
            for i, kind in zip(ids, kinds, strict=True)
        ],
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 2,
        "ggml.eos_token_id": 1,
        "ggml.unknown_token_id": 3,
        "ggml.padding_token_id": 0,
        "ggml.add_bos_token": True,
        "ggml.add_space_prefix": False,
    }


WHITE = st.lists(
    st.sampled_from([*RUNS, " ", "  ", SPACE, "\t", "key", "the", "two", "\u00e9", "\U0001f642"])
).map("".join)


@given(WHITE)
@example(f"a  b       c {SPACE} d\t\t\t\n\n\n\n <table>")
def test_runs_of_white_space_are_tokens_as_sentencepiece_finds_them(
    trained: Any, text: str
) -> None:
    assert [trained.piece_to_id(run) for run in RUNS] == [*range(4, 4 + len(RUNS))]
    opened = Pair(Tokenizer(models.BPE()), converted(trained)).opened()
    ids = opened(text)["input_ids"]
    assert ids == [2, *trained.encode(text)]
    assert opened.decode(ids[1:]) == trained.decode(ids[1:])


# ---- byte-level


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splitting(pre: str) -> Any:
    own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "gpt-2":
        return own
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own])
    split = Regex(QWEN2 if pre == "qwen2" else LLAMA3)
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), bytes_alone])


@cache
def byte_level(pre: str) -> Pair:
    """The tokenizer.json of GPT-2, SmolLM, Qwen2 or Llama 3, and the GGUF's fields."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = splitting(pre)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator([TEXT, *TEXT.split(" ")] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    # a word that no merges lead to: Llama 3 has such tokens
    vocabulary = {**model["vocab"], "Hello": len(model["vocab"])}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [tuple(merge) for merge in model["merges"]],
            ignore_merges=pre == "llama-bpe",
        )
    )
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None  # type: ignore[assignment]
    tokenizer.pre_tokenizer = splitting(pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(added(special=True, tokens=SPECIAL[1:]))
    tokenizer.add_tokens(added(special=False, tokens=PLAIN))
    whole = tokenizer.get_vocab()
    tokens = sorted(whole, key=lambda token: whole[token])
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", whole["<s>"])]
        )
    fields = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": [*tokens, "[PAD9]"],
        "ggml.token_type": [*types_of(tokens), 5],
        "ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "ggml.bos_token_id": whole["<s>"],
        "ggml.eos_token_id": whole["</s>"],
    }
    return Pair(tokenizer, fields)


PRES = ("gpt-2", "smollm", "qwen2", "llama-bpe")


@pytest.mark.parametrize("text", KNOWN)
@pytest.mark.parametrize("pre", PRES)
def test_byte_level_on_known_texts(pre: str, text: str) -> None:
    byte_level(pre).check(text)


@pytest.mark.parametrize("pre", PRES)
@given(text=TEXTS)
def test_byte_level_on_any_text(pre: str, text: str) -> None:
    byte_level(pre).check(text)


def test_what_the_names_stand_for() -> None:
    """The kinds differ on the texts that are there to tell them apart."""
    ids = {pre: byte_level(pre).opened() for pre in PRES}
    composed = {
        pre: made("e\u0301")["input_ids"] == made("é")["input_ids"] for pre, made in ids.items()
    }
    assert composed == {"gpt-2": False, "smollm": False, "qwen2": True, "llama-bpe": False}
    whole = {
        pre: len(made("Hello", add_special_tokens=False)["input_ids"]) for pre, made in ids.items()
    }
    assert [pre for pre, count in whole.items() if count == 1] == ["llama-bpe"]
    assert ids["llama-bpe"]("x")["input_ids"][0] == ids["llama-bpe"].bos_token_id


# ---- what is refused, through the file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ggml.pre": "tekken"}, "GGUF pre-tokenizer 'tekken' is not served"),
        ({"ggml.model": "t5"}, "GGUF tokenizer 't5' is not served"),
        ({"ggml.add_space_prefix": True}, "tokenizer.ggml.add_space_prefix = True is not served"),
        ({"ggml.add_sep_token": True}, "tokenizer.ggml.add_sep_token = True is not served"),
        ({"ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces = True is not served"),
        ({"ggml.precompiled_charsmap": [1, 2]}, "precompiled_charsmap = [1, 2] is not served"),
        ({"ggml.eos_token_id": 4000}, "eos_token_id = 4000 where an id from 0 to 319"),
        ({"ggml.eos_token_id": "x"}, "eos_token_id = 'x' where a whole number was expected"),
        ({"ggml.add_bos_token": 1}, "add_bos_token = 1 where true or false was expected"),
        ({"ggml.token_type": [1, 1]}, "it lists 320 tokens and 2 token types"),
        ({"ggml.merges": ["a b c"]}, "the merge 'a b c' is not two pieces"),
        ({"ggml.merges": None}, "lacks the field tokenizer.ggml.merges"),
        ({"ggml.bos_token_id": None, "ggml.add_bos_token": True}, "names no bos_token"),
        ({"chat_template": None, "chat_template.rag": "x"}, "and no tokenizer.chat_template"),
    ],
)
def test_a_tokenizer_that_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tokenizer={**byte_level_fields("smollm"), **changes})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_that_is_listed_twice(tmp_path: Path) -> None:
    fields = byte_level_fields("smollm")
    fields["ggml.tokens"][5] = fields["ggml.tokens"][6]
    write_gguf(tmp_path / "tiny.gguf", tokenizer=fields)
    with pytest.raises(CheckpointError, match="is listed twice"):
        open_checkpoint(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("padding", [4000, 2**32 - 1])
def test_a_padding_id_outside_of_the_vocabulary_is_none(tmp_path: Path, padding: int) -> None:
    fields = {**byte_level_fields("smollm"), "ggml.padding_token_id": padding}
    write_gguf(tmp_path / "tiny.gguf", tokenizer=fields)
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert json.loads(checkpoint.tokenizer_files["generation.json"])["pad_token_id"] is None


def test_a_row_that_a_file_names_is_a_token(tmp_path: Path) -> None:
    """Converters call a row unused where the original had no token, and yet may name it."""
    fields = byte_level_fields("smollm")
    fields["ggml.token_type"][-1] = 5
    write_gguf(tmp_path / "tiny.gguf", tokenizer={**fields, "ggml.padding_token_id": 319})
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert json.loads(checkpoint.tokenizer_files["generation.json"])["pad_token_id"] == 319


def test_a_sentencepiece_gguf_is_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    templates = {
        "chat_template": "default",
        "chat_template.rag": "other",
        "chat_templates": ["rag"],
    }
    write_gguf(path, tokenizer={**sentencepiece().fields, **templates})
    checkpoint = open_checkpoint(str(path))
    packaged = Tokenizer.from_str(checkpoint.tokenizer_files["tokenizer.json"])
    for text in KNOWN:
        assert packaged.encode(text).ids == sentencepiece().original.encode(text).ids
    assert checkpoint.tokenizer_files["chat_template.jinja"] == "default"
    assert checkpoint.eos_token_ids == (2,)
