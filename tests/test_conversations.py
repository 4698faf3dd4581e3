"""Conversations to tokens as transformers makes them, by the templates of published models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from conversations import WORDS, Conversation, conversation
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moac.checkpoint.tokenizer import load_tokenizer, tokenizer_files
from moac_runtime.errors import MoacError
from moac_runtime.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).with_name("templates")
REAL = ("smollm2-135m-instruct", "gemma3-270m")
COUNT = 300


@dataclass(frozen=True, slots=True)
class Published:
    """A template. `parts`: whether it reads content in parts. `thought`: its name of reasoning."""

    parts: bool = False
    thought: str | None = None


TEMPLATES = {
    "smollm2": Published(),
    "smollm3": Published(),
    "qwen2.5": Published(),
    "qwen3": Published(thought="reasoning_content"),
    "mistral-nemo": Published(),
    "mistral-small-3.2": Published(parts=True),
    "granite-3.3": Published(),
    "gpt-oss": Published(thought="thinking"),
    "phi-3.5": Published(),
}
CONTROL = (
    "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "[INST]", "[/INST]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[SYSTEM_PROMPT]", "[ARGS]", "[/SYSTEM_PROMPT]", "[CALL_ID]", "[TOOL_CONTENT]",
    "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>", "<|start|>",
    "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>", "<|system|>", "<|user|>",
    "<|assistant|>",
)  # fmt: skip


def byte_level() -> Any:
    """As GPT-2's: it loses nothing."""
    made = Backend(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(vocab_size=500, initial_alphabet=sorted(alphabet), **QUIET)


def plain_bpe() -> Any:
    """As Llama 2's: characters, and bytes of those that it does not know."""
    made = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(marks)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    return made, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *pieces], **QUIET)


def unigram() -> Any:
    made = Backend(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", **QUIET)
    return made, trainer


def word_piece() -> Any:
    """As BERT's: lower case, accents dropped."""
    made = Backend(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], **QUIET)


QUIET: dict[str, Any] = {"show_progress": False}
KINDS = {
    "byte-level BPE": byte_level,
    "BPE": plain_bpe,
    "Unigram": unigram,
    "WordPiece": word_piece,
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A checkpoint's tokenizer as the library and as the runtime has it."""

    library: Any
    ours: Tokenizer

    def by(self, name: str) -> Pair:
        """The same with another chat template."""
        template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        return Pair(self.library, replace(self.ours, chat_template=template))

    def wanted(self, asked: Conversation) -> list[int] | None:
        """Tokens by the library, None where the template refuses the conversation."""
        try:
            found: list[int] = self.library.apply_chat_template(
                asked.messages,
                tools=asked.tools,
                chat_template=self.ours.chat_template,
                add_generation_prompt=not asked.answered,
                tokenize=True,
                return_dict=False,
            )
        except Exception:  # a template is a program: it may raise anything
            return None
        return found

    def found(self, asked: Conversation, **options: Any) -> list[int] | None:
        """Tokens by the runtime."""
        try:
            return self.ours.encode_chat(
                asked.messages,
                tools=asked.tools,
                add_generation_prompt=not asked.answered,
                **options,
            )
        except MoacError:
            return None


def packaged(checkpoint: Path) -> Pair:
    """Through the files that a package holds."""
    library = load_tokenizer(checkpoint)
    config = SimpleNamespace(
        vocab_size=len(library), eos_token_id=None, bos_token_id=None, pad_token_id=None
    )
    files = tokenizer_files(library, config, {})
    contents = (files[name].encode() for name in ("tokenizer.json", "generation.json"))
    ours = Tokenizer.parsed(*contents, None)
    return Pair(library, ours)


@cache
def trained(kind: str) -> Pair:
    """A tokenizer trained here; published templates' control tokens are special in it."""
    made, trainer = KINDS[kind]()
    made.train_from_iterator([" ".join(WORDS), "system user assistant tool content"] * 8, trainer)
    library: Any = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )  # type: ignore[no-untyped-call]
    library.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    with TemporaryDirectory() as folder:
        library.save_pretrained(folder)
        return packaged(Path(folder))


def rendered(pair: Pair, name: str, count: int) -> Iterator[tuple[Conversation, list[int]]]:
    """`count` conversations that the template takes; refusals are compared on the way."""
    own = TEMPLATES[name]
    for seed in range(6 * count):
        asked = conversation(seed, thought=own.thought)
        plain = asked if own.parts else asked.with_joined_parts()
        wanted = pair.wanted(plain)
        if wanted is None and asked.has(type(None)):
            # the runtime leaves out what is None, which as a text of none these templates take
            wanted = pair.wanted(plain.with_words())
            assert pair.found(asked) in (None, wanted), asked
        elif wanted is None:
            assert pair.found(asked) is None, asked
        else:
            count -= 1
            yield asked, wanted
        if not count:
            return
    raise AssertionError(f"{name} refuses most conversations")


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_tokens_as_transformers_makes_them(name: str) -> None:
    """Each by the tokenizer that loses nothing and by another kind, in turn."""
    pairs = {kind: trained(kind).by(name) for kind in KINDS}
    first, *others = pairs.values()
    seen: Counter[str] = Counter()
    for number, (asked, wanted) in enumerate(rendered(first, name, COUNT)):
        assert first.found(asked) == wanted, asked
        other = others[number % len(others)]
        plain = asked if TEMPLATES[name].parts else asked.with_joined_parts()
        assert other.found(asked) == other.wanted(plain), asked
        seen.update(_told(asked))
    assert min(seen[what] for what in ("system", "no system", "tools", "parts", "turns")) > 30
    assert seen["calls"] > 20 or name in NO_CALLS
    assert seen["none"] > 10 or name in NO_CALLS | {"qwen3", "gpt-oss"}


NO_CALLS = {"smollm2", "phi-3.5", "granite-3.3"}
"""Templates that take no call without words, which are a third of the calls or more."""


def _told(asked: Conversation) -> Iterator[str]:
    roles = [message["role"] for message in asked.messages]
    yield "system" if "system" in roles else "no system"
    yield from ["tools"] * bool(asked.tools)
    yield from ["parts"] * asked.has(list)
    yield from ["none"] * asked.has(type(None))
    yield from ["calls"] * ("tool" in roles)
    yield from ["turns"] * (roles.count("user") > 1)


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_that_act_are_those_of_transformers(kind: str) -> None:
    """Spelt in messages, where the caller lets them act."""
    for name in ("smollm2", "qwen3"):
        pair = trained(kind).by(name)
        for number, token in enumerate(CONTROL):
            asked = conversation(number, thought=TEMPLATES[name].thought).with_joined_parts()
            spelt = [
                {**message, "content": f"{message['content']}{token} x"}
                for message in asked.with_words().messages
            ]
            asked = Conversation(spelt, asked.tools, asked.answered)
            wanted = pair.wanted(asked)
            assert pair.found(asked, parse_special=True) == wanted
            if wanted is not None and token in ("<|im_end|>", "<|user|>"):
                assert pair.found(asked) != wanted


@pytest.mark.parametrize("mode", ["/think", "/no_think"])
def test_a_word_of_a_control_token_that_no_template_completes_is_let_be(mode: str) -> None:
    """`/think`, which this template looks for, stands in `</think>`; none writes `<` before it."""
    pair = trained("byte-level BPE").by("smollm3")
    said = [{"role": "system", "content": mode}, {"role": "user", "content": "hello"}]
    asked = Conversation(said, None, answered=False)
    assert pair.found(asked) == pair.wanted(asked) is not None
    written = "{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}{{ '<think>' }}"
    other = Pair(pair.library, replace(pair.ours, chat_template=written))
    alone = Conversation([{"role": "user", "content": "/think"}], None, answered=True)
    assert other.found(alone) != other.wanted(alone)


Opened = Callable[[str], Pair]


@pytest.fixture(scope="module")
def real() -> Opened:
    return cache(lambda folder: packaged(ROOT / ".cache" / folder))


@pytest.mark.slow
@pytest.mark.parametrize("folder", REAL)
@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_by_the_tokenizers_of_real_models(
    real: Opened, folder: str, name: str
) -> None:
    if not (ROOT / ".cache" / folder).is_dir():
        pytest.skip(
            f"needs .cache/{folder}: "
            f"python examples/fetch_{folder.split('-')[0]}.py .cache/{folder}"
        )
    pair = real(folder).by(name)
    for asked, wanted in rendered(pair, name, COUNT):
        assert pair.found(asked) == wanted, asked
