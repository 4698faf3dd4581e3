"""Tokenizers of other files, tokens without an embedding, templates that cannot be used."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from families import FAMILIES, VOCAB, save_checkpoint, tiny_model, tiny_tokenizer
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_checkpoint import edit_json, refusal
from tiny import CONTEXT, moac_command, options
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moac.calibration import calibration_text
from moac.calibration.prompt import PromptFormat
from moac.checkpoint import Checkpoint, open_checkpoint
from moac_runtime.errors import MoacError
from moac_runtime.text.stream import TextStream
from moac_runtime.text.tokenizer import Tokenizer as PackagedTokenizer

Make = Callable[..., Path]

TEXTS = (
    "The pass key is 12345. Remember it.",
    "  two spaces",
    " lead",
    "a\nb\n\n  c\t.",
    "\u6f22\u5b57 caf\u00e9 \U0001f642",
    "<s>[INST] hi [/INST]",
    "foo</s>bar <|im_end|>x",
    "",
)
# Earlier ones make another tokenizer of a bare tokenizer.model, which we then follow and tell of.
READS_AS_TODAY = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24),
    reason="this transformers reads a tokenizer.model by itself in another way",
)
NEEDS_TOOLS = "{% for tool in tools %}{{ tool }}{% endfor %}{{ messages[0]['content'] }}"
BROKEN = "{% for message in messages %}{{ message.content }"
REFUSES = "{{ raise_exception('give a system message first') }}"
DROPS = "{% for m in messages if m.role == 'human' %}{{ m.content }}{% endfor %}hello"
LAST_ONLY = "{{ messages[-1]['content'] }}"
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['content'] | trim }}]"
    "{% endfor %}"
)


@pytest.fixture
def copy(tiny_checkpoint: Make, tmp_path: Path) -> Callable[..., Path]:
    """A directory of one's own, of a family or of a Llama long enough to compile."""

    def make(family: str = "llama", **choices: Any) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny_checkpoint(family, **choices), folder)
        return folder

    return make


def trained(kind: str, **choices: Any) -> bytes:
    """A small sentencepiece model over the calibration text."""
    model = io.BytesIO()
    text = [line for document in calibration_text()[:2] for line in document.paragraphs[:150]]
    SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type=kind,
        vocab_size=400,
        character_coverage=0.98,
        byte_fallback=True,
        minloglevel=9,
        **choices,
    )
    return model.getvalue()


def without_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    return folder


def sentencepiece_checkpoint(folder: Path, model: bytes, family: str = "llama") -> Path:
    save_checkpoint(tiny_model(family, vocab_size=400, max_position_embeddings=CONTEXT), folder)
    (without_tokenizer(folder) / "tokenizer.model").write_bytes(model)
    return folder


def packaged(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_str(checkpoint.tokenizer_files["tokenizer.json"])


def assert_same_ids(folder: Path) -> Checkpoint:
    """The package's tokenizer writes every text as transformers' does."""
    checkpoint, theirs = open_checkpoint(str(folder)), AutoTokenizer.from_pretrained(folder)
    ours = packaged(checkpoint)
    for text in TEXTS:
        for special in (False, True):
            found = ours.encode(text, add_special_tokens=special).ids
            assert found == theirs(text, add_special_tokens=special)["input_ids"], text
    return checkpoint


# ---- tokenizers made of other files


@READS_AS_TODAY
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, family: str
) -> None:
    model = trained(kind, split_digits=True, user_defined_symbols=["<|im_end|>"])
    folder = sentencepiece_checkpoint(tmp_path / "c", model, family)
    capfd.readouterr()
    checkpoint = assert_same_ids(folder)
    assert capfd.readouterr() == ("", "")
    assert checkpoint.notes == ()
    own, ours = SentencePieceProcessor(model_proto=model), packaged(checkpoint)
    for text in TEXTS[:5]:
        assert ours.encode(text, add_special_tokens=False).ids == own.encode(text)


def packaged_tokenizer(folder: Path) -> PackagedTokenizer:
    """What a package whose tokenizer is in this folder answers with."""
    files = (folder / name for name in ("tokenizer.json", "generation.json"))
    return PackagedTokenizer.parsed(*(file.read_bytes() for file in files), None)


def test_a_sentencepiece_checkpoint_compiles_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = sentencepiece_checkpoint(tmp_path / "c", trained("unigram")), tmp_path / "out"
    work = tmp_path / "work"
    assert moac_command("compile", folder, "-o", out, *options(), "--work-dir", work) == 0
    capsys.readouterr()
    assert moac_command("run", out, "--prompt", "What is the key?", "--max-tokens", 4) == 0
    read = packaged_tokenizer(out / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert read.encode("The key.", special=True) == theirs("The key.")["input_ids"]


@READS_AS_TODAY
def test_a_class_that_reads_other_ids_than_sentencepiece_is_told(tmp_path: Path) -> None:
    folder = sentencepiece_checkpoint(tmp_path / "c", trained("unigram"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    checkpoint = assert_same_ids(folder)
    (note,) = checkpoint.notes
    assert "as a LlamaTokenizer, whose tokens are not sentencepiece's own" in note
    from transformers import PreTrainedTokenizerFast

    loader: Any = PreTrainedTokenizerFast
    loader.from_pretrained(folder).save_pretrained(folder)  # what the note says to do
    mended = open_checkpoint(str(folder))
    own = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert mended.notes == ()
    assert packaged(mended).encode(TEXTS[0], add_special_tokens=False).ids == own.encode(TEXTS[0])


def test_a_class_that_loses_text_is_refused(tmp_path: Path) -> None:
    folder = sentencepiece_checkpoint(tmp_path / "c", trained("bpe"), "qwen2")
    named = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    assert "as a Qwen2Tokenizer, which loses parts of a text; set tokenizer_class" in refusal(
        folder
    )


def test_a_damaged_tokenizer_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = sentencepiece_checkpoint(tmp_path / "c", trained("bpe"))
    path = folder / "tokenizer.model"
    whole = path.read_bytes()
    capfd.readouterr()
    for damaged in (b"\x0e\xff" * 40, whole[: len(whole) // 2 + 1], b""):
        path.write_bytes(damaged)
        assert refusal(folder) == (
            f"{path} is neither a sentencepiece model nor a tiktoken file, or it is cut short; "
            "copy it from the original checkpoint again"
        )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_a_missing_reader_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    from importlib.util import find_spec

    folder = sentencepiece_checkpoint(tmp_path / "c", trained("bpe"))
    monkeypatch.setattr(
        "moac.checkpoint.tokenizer_sources.find_spec",
        lambda name: None if name == missing else find_spec(name),
    )
    with pytest.raises(
        MoacError, match=rf"needs {missing}, .* run: pip install 'moac\[compile\]'"
    ):
        open_checkpoint(str(folder))


def tiktoken_file(path: Path, *, reverse: bool = False) -> None:
    """The tiny vocabulary without its special tokens, as lines of base64 and rank."""
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocabulary = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    tokens = sorted((id, token) for token, id in vocabulary.items() if id >= 3)
    words = [bytes(letters[letter] for letter in token) for _, token in tokens]
    if reverse:  # another order of the single bytes
        words[:256] = words[:256][::-1]
    lines = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(words)]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_a_tiktoken_file(
    copy: Callable[..., Path], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    folder = without_tokenizer(copy())
    tiktoken_file(folder / name)
    capfd.readouterr()
    first = assert_same_ids(folder)
    assert capfd.readouterr() == ("", "")
    assert packaged(first).decode(packaged(first).encode(TEXTS[4]).ids) == TEXTS[4]
    tiktoken_file(folder / name, reverse=True)
    second = open_checkpoint(str(folder))
    assert packaged(first).encode("a b").ids != packaged(second).encode("a b").ids
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


def words_and_merges(folder: Path) -> Path:
    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    without_tokenizer(folder)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return folder


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer"), ("qwen3", None)],
)
def test_words_and_merges_without_a_tokenizer_json(
    copy: Callable[..., Path], family: str, name: str | None
) -> None:
    folder = words_and_merges(copy(family))
    if name is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    before = assert_same_ids(folder)
    assert "chat_template.jinja" in before.tokenizer_files


def test_words_and_merges_that_nothing_can_be_made_of(copy: Callable[..., Path]) -> None:
    folder = words_and_merges(copy())
    assert "set tokenizer_class in its tokenizer_config.json to the model's own" in refusal(folder)
    (folder / "merges.txt").unlink()
    assert "holds vocab.json without merges.txt, half a tokenizer" in refusal(folder)
    (folder / "vocab.json").unlink()
    (folder / "tekken.json").write_text("{}")
    assert "in Mistral's own format alone (tekken.json)" in refusal(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_tokenizer_class_is_its_tokenizer_json(
    copy: Callable[..., Path], family: str
) -> None:
    folder = copy(family)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="OursTokenizer")
    assert_same_ids(folder)


@pytest.mark.parametrize("mapped", [{"AutoTokenizer": ["own.OwnTokenizer", None]}, ["own.Own"]])
def test_a_tokenizer_of_its_own_code_is_refused_by_name(
    copy: Callable[..., Path], mapped: Any
) -> None:
    folder = copy()
    edit_json(folder / "tokenizer_config.json", auto_map=mapped)
    assert "names a tokenizer of its own code (own.Own" in refusal(folder)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoProcessor": "own.Own"})
    assert open_checkpoint(str(folder)).notes == ()


# ---- tokens and embeddings


def with_tokens(folder: Path, add: Callable[[Any], object]) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_padding_token_beyond_the_embedding(
    copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_tokens(
        copy(max_position_embeddings=CONTEXT),
        lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}),
    )
    out, work = tmp_path / "out", tmp_path / "work"
    for name in ("config.json", "generation_config.json"):
        edit_json(folder / name, pad_token_id=VOCAB)
    assert moac_command("compile", folder, "-o", out, *options(), "--work-dir", work) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        f"note: the tokenizer of {folder} knows '[PAD]', for which the model has no embedding "
        f"(it has {VOCAB}); a raw prompt that spells one is refused\n"
    )
    settings = json.loads((out / "tokenizer" / "generation.json").read_text())
    assert (settings["pad_token"], settings["pad_token_id"]) == ("[PAD]", None)
    spelt = ("run", out, "--prompt", "x [PAD] y", "--max-tokens", 2)
    assert moac_command(*spelt) == 0  # what a prompt spells is text
    capsys.readouterr()
    assert moac_command(*spelt, "--parse-special") == 1
    found = capsys.readouterr()
    assert found.err == (
        f"error: the prompt holds '[PAD]', token {VOCAB}, but the model knows {VOCAB}; "
        "leave it out of the prompt\n"
    )
    assert moac_command("run", out, "--prompt", "x y", "--max-tokens", 2) == 0


def test_a_sample_that_spells_a_token_beyond_the_embedding(
    copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_tokens(
        copy(max_position_embeddings=CONTEXT),
        lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}),
    )
    lines = tmp_path / "own.jsonl"
    asked = ("plan", folder, "-o", tmp_path / "p.json", "--calibration", lines, "--dry-run")
    for sample, code in (({"prompt": "a [PAD]"}, 0), ({"prompt": "a", "response": "b[PAD]"}, 2)):
        lines.write_text('{"prompt": "good"}\n' + json.dumps(sample) + "\n")
        assert moac_command(*asked) == code
    assert f"{lines} line 2 holds '[PAD]', for which the model" in capsys.readouterr().err


def test_text_that_would_be_fed_beyond_the_embedding(copy: Callable[..., Path]) -> None:
    folder = with_tokens(copy(), lambda tokenizer: tokenizer.add_tokens(["secret"]))
    assert f"reads the text 'secret' as the token {VOCAB}, but the model has embed" in refusal(
        folder
    )


def test_a_vocabulary_beyond_the_embedding(copy: Callable[..., Path]) -> None:
    folder = copy()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zz"] = VOCAB + 5
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert refusal(folder) == (
        f"the tokenizer of {folder} has the ids 0 to {VOCAB + 5}, but the model has embeddings "
        f"for 0 to {VOCAB - 1} alone; resize the embedding (model.resize_token_embeddings) and "
        "save the checkpoint again, or copy the tokenizer from the original checkpoint"
    )


def test_an_opening_token_beyond_the_embedding(copy: Callable[..., Path]) -> None:
    folder = with_tokens(
        copy(), lambda tokenizer: tokenizer.add_special_tokens({"bos_token": "<new>"})
    )
    edit_json(folder / "config.json", bos_token_id=VOCAB)
    checkpoint = open_checkpoint(str(folder))  # nothing feeds it
    settings = json.loads(checkpoint.tokenizer_files["generation.json"])
    assert settings["bos_token_id"] == 1
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<new>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<new>": {"id": "<new>", "ids": [VOCAB], "tokens": ["<new>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"puts '<new>' ({VOCAB}) around every text" in refusal(folder)


def test_ends_beyond_the_embedding(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_json(folder / "generation_config.json", eos_token_id=[2, VOCAB + 1])
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.eos_token_ids == (2,)
    (note,) = checkpoint.notes
    assert note.startswith(f"{folder} names the end {VOCAB + 1}, which the model cannot say")
    edit_json(folder / "generation_config.json", eos_token_id=[VOCAB, VOCAB + 1])
    assert f"names eos_token_id {VOCAB}, but its vocabulary has the ids" in refusal(folder)
    edit_json(folder / "generation_config.json", eos_token_id="2")
    assert "names eos_token_id '2' where a token id was expected" in refusal(folder)


def test_rows_of_the_embedding_without_a_token(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model("llama", vocab_size=VOCAB + 64), tmp_path / "c")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.notes == ()
    checkpoint.save_tokenizer(tmp_path / "t")
    read = packaged_tokenizer(tmp_path / "t")
    ids = [*read.encode("key", special=False), VOCAB + 7]
    assert read.decode(ids) == "key"
    stream = TextStream(read.decode)
    assert "".join([*map(stream.push, ids), stream.finish()]) == "key"


# ---- chat templates


def faulty(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (NEEDS_TOOLS, "'NoneType' object is not iterable"),
        (BROKEN, "unexpected '}'"),
        (REFUSES, "give a system message first"),
        (DROPS, "it leaves out what the user says"),
        (LAST_ONLY, "it leaves out what the user says"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("nothing", "it leaves out what the user says"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_and_left(
    copy: Callable[..., Path], template: str, reason: str
) -> None:
    folder = faulty(copy(), template)
    checkpoint = open_checkpoint(str(folder))
    (note,) = checkpoint.notes
    assert note.startswith(f"the chat template of {folder} cannot be used (")
    assert reason in note
    assert "\n" not in note
    format = PromptFormat(checkpoint.load_tokenizer())
    assert not format.has_template
    assert format.opening_text("hi") == "hi\nAnswer:"
    assert checkpoint.tokenizer_files["chat_template.jinja"] == template


def test_a_template_with_a_token_beyond_the_embedding(copy: Callable[..., Path]) -> None:
    folder = with_tokens(
        copy(),
        lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<|turn|>"}),
    )
    faulty(folder, "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}")
    absent, unusable = open_checkpoint(str(folder)).notes
    assert "knows '<|turn|>', for which the model has no embedding" in absent
    assert "(it writes '<|turn|>', for which the model has no embedding)" in unusable


def test_a_strict_template_is_used(copy: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(faulty(copy(), STRICT)))
    assert checkpoint.notes == ()
    format = PromptFormat(checkpoint.load_tokenizer())
    assert format.opening_text("hi") == "[hi]"
    assert format.decode(format.turn("more")) == "][more]"


def test_a_broken_template_compiles_raw_and_the_package_says_so(
    copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = faulty(copy(max_position_embeddings=CONTEXT), NEEDS_TOOLS)
    out, work = tmp_path / "out", tmp_path / "work"
    assert moac_command("compile", folder, "-o", out, *options(), "--work-dir", work) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(f"note: the chat template of {folder} cannot be used (")
    assert json.loads((out / "plan.json").read_text())["prompts"] == "raw"
    assert moac_command("inspect", out) == 0
    assert "plain text, as of run --raw: there is no chat template" in capsys.readouterr().out
    assert moac_command("run", out, "--prompt", "hi", "--max-tokens", 2) == 1
    assert "use --raw" in capsys.readouterr().err
    assert moac_command("run", out, "--raw", "--prompt", "hi", "--max-tokens", 2) == 0
    asked = ("--tasks", "passkey", "--lengths", 512, "--samples", 1, "--against", "dense")
    assert moac_command("eval", out, "--source", folder, *asked) == 0
    assert "cannot be used" in capsys.readouterr().err


def test_what_a_template_refuses_of_a_users_own_lines_is_told_before_any_work(
    copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = faulty(copy(max_position_embeddings=CONTEXT), STRICT)
    lines = tmp_path / "own.jsonl"
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    lines.write_text(json.dumps({"messages": talk}) + "\n")
    asked = ("-o", tmp_path / "out", "--calibration", lines, *options())
    assert moac_command("compile", folder, *asked) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {lines} line 1: the chat template refused this conversation (no system); "
    )


def test_errors_of_a_template_that_are_no_template_errors(copy: Callable[..., Path]) -> None:
    needs = (
        "{{ messages[0]['content'] }}{{ 1 / (2 - messages | length) }}{{ messages[-1].content }}"
    )
    tokenizer = open_checkpoint(str(copy())).load_tokenizer()
    tokenizer.chat_template = needs
    talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(MoacError, match=r"chat template refused .*\(division by zero\)"):
        PromptFormat(tokenizer).messages(talk)


def test_a_processors_template_is_told(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "chat_template.jinja").rename(folder / "chat_template.json")
    (folder / "chat_template.json").write_text('{"chat_template": "x"}')
    (note,) = open_checkpoint(str(folder)).notes
    assert "write it as text to chat_template.jinja" in note


@pytest.mark.parametrize("template", [7, ["x"], [{"name": "default"}], {"default": 3}])
def test_a_chat_template_of_another_type(copy: Callable[..., Path], template: Any) -> None:
    folder = copy()
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    refusal(folder)


def test_the_template_file_goes_before_the_one_in_the_config(copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_json(folder / "tokenizer_config.json", chat_template=REFUSES)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.notes == ()
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    assert checkpoint.tokenizer_files["chat_template.jinja"] == theirs.chat_template
