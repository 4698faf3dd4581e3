"""Calibration samples: long-dependency sequences whose answers the dense model gave itself.

MoA (arXiv 2406.14909, section 5.1): which data calibrates decides more than the solver, and
answers come from the dense model. Only answer tokens carry loss.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moac.calibration.answers import AnswersModel, DenseReader
from moac.calibration.haystack import Needle, haystack_words, hide, most_words
from moac.calibration.prompt import PromptFormat
from moac.calibration.tasks import (
    CLOSINGS,
    INTRODUCTIONS,
    Fact,
    Question,
    document_questions,
    draw_facts,
)
from moac.calibration.text import calibration_text, running_words
from moac_runtime.errors import UsageError

DOMAINS = ("retrieval", "documents", "text")
"""What a profile learns from."""

MEASURED_KINDS = ("quiz", "documents", "text")
"""What losses are measured on: a quiz is retrieval with many answers in one reading."""

DEFAULT_SAMPLES: Mapping[int, int] = {1024: 6, 2048: 4, 4096: 2}

_ANSWER_TOKENS = 24
_MOST_FACTS = 8
_SPARE_FACTS = 2  # planted beyond the room reserved: asked where short answers leave room
_PLANTED = (1, 1, 2)  # facts that one question is asked about
_TRIES = 4
_CLASSIC_EVERY = 3  # of the retrieval samples, one asks for a pass key or its like
_DOCUMENT_TOKENS = 400

TEXT_TOKENS = 1024
"""The most tokens of a sample of running text that carry loss."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CalibrationSample:
    """One tokenized sequence of at most `length` tokens, the planned length it stands for.

    `answer_spans`: `(start, end)` token positions that carry loss, `end` exclusive, in order.
    `correct`: for each span whether it holds the planted value; None where nothing was planted.
    `values`: the token positions, within spans, that say a planted value.
    """

    domain: str
    length: int
    token_ids: tuple[int, ...]
    answer_spans: tuple[tuple[int, int], ...]
    correct: tuple[bool | None, ...]
    values: tuple[tuple[int, int], ...] = ()

    @property
    def believed(self) -> tuple[tuple[int, int], ...]:
        """Answers that carry loss: a wrong one tells nothing of where the right one was found."""
        judged = zip(self.answer_spans, self.correct, strict=True)
        right = tuple(span for span, correct in judged if correct is not False)
        return right or self.answer_spans

    @property
    def decisive(self) -> tuple[tuple[int, int], ...]:
        """Answer tokens that show whether something was found: the rest is in the question."""
        return self.values or self.believed


def build_calibration(
    model: AnswersModel,
    tokenizer: Any,
    *,
    samples_per_length: Mapping[int, int] = DEFAULT_SAMPLES,
    domains: Sequence[str] = DOMAINS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[CalibrationSample]:
    """`samples_per_length[length]` samples of every one of `domains`, shortest first.

    `domains` may name "quiz" too, whose samples are of the domain "retrieval".
    `model`: the dense checkpoint; `tokenizer`: its own in transformers. Equal arguments give equal
    samples, and a sample does not depend on how many others are asked for. `progress(done,
    total)` is called after each. Raises UsageError for an unknown domain or too short a length.
    """
    unknown = [domain for domain in domains if domain not in _MAKERS]
    if unknown:
        raise UsageError(
            f"calibration domain {unknown[0]!r} is unknown; choose from {', '.join(DOMAINS)}"
        )
    wanted = [
        (length, domain, index)
        for length, count in sorted(samples_per_length.items())
        for domain in domains
        for index in range(count)
    ]
    samples = []
    for done, (length, domain, index) in enumerate(wanted, start=1):
        rng = random.Random(f"{seed}/{domain}/{length}/{index}")
        samples.append(_MAKERS[domain](model, PromptFormat(tokenizer), length, rng, index))
        if progress is not None:
            progress(done, len(wanted))
    return samples


def retrieval_sample(
    model: AnswersModel, format: PromptFormat, length: int, rng: random.Random, index: int
) -> CalibrationSample:
    """A fact or two at uniform depths of a haystack, and one question.

    Two of four in a row hide in filler, and every third asks for a pass key or its like: left to
    chance, a few samples of a length may hardly tell of either, and plans lose there first.

    An answer earlier in the conversation would show how to answer, and heads that find out what
    is asked would look idle. Made anew where the dense model answers wrong, up to four times: a
    wrong answer tells nothing of where the right one was found.
    """
    filler = index // 2 % 2 == 1
    for _ in range(_TRIES):
        facts = draw_facts(rng, rng.choice(_PLANTED), classic=index % _CLASSIC_EVERY == 0)
        sample = _hidden(
            *(model, format, length, rng, facts, [_about(facts[0])]), spare=0, filler=filler
        )
        if sample.correct[0]:
            break
    return sample


def quiz_sample(
    model: AnswersModel, format: PromptFormat, length: int, rng: random.Random, index: int
) -> CalibrationSample:
    """Facts at uniform depths of a haystack, then one question and answer after another."""
    facts = _affordable(format, draw_facts(rng, _MOST_FACTS), length)
    questions = [_about(fact) for fact in facts]
    rng.shuffle(questions)
    filler = index % 2 == 1
    return _hidden(
        *(model, format, length, rng, facts, questions), spare=_SPARE_FACTS, filler=filler
    )


def _hidden(
    model: AnswersModel,
    format: PromptFormat,
    length: int,
    rng: random.Random,
    facts: Sequence[Fact],
    questions: Sequence[Question],
    *,
    spare: int,
    filler: bool,
) -> CalibrationSample:
    """`facts` in a haystack and `questions` about them, room reserved for all but `spare`."""
    needles = [Needle(fact.needle, rng.random()) for fact in facts]
    introduction, closing = rng.choice(INTRODUCTIONS), rng.choice(CLOSINGS)
    words = haystack_words(calibration_text(), rng, length, filler=filler)

    def render(count: int) -> list[int]:
        haystack = hide(words[:count], needles)
        question = f"{closing} {questions[0].text}".lstrip()
        return format.opening(f"{introduction}\n\n{haystack}\n\n{question}")

    reserved = questions[: max(1, len(questions) - spare)]
    opening = _longest(format, render, length, reserved, "retrieval")
    return converse(model, format, "retrieval", opening, questions, length)


def documents_sample(
    model: AnswersModel, format: PromptFormat, length: int, rng: random.Random, index: int
) -> CalibrationSample:
    """Several numbered passages with titles, then quotes and summaries of some of them."""
    number = max(2, min(8, length // _DOCUMENT_TOKENS))
    texts = [running_words(calibration_text(), rng, length) for _ in range(number)]
    titles = [f"Document {i + 1}: {_title(text)}" for i, text in enumerate(texts)]
    openings = ["".join(text[:4]).strip() for text in texts]
    questions = document_questions(rng, openings)[: max(1, length // 256)]

    def render(count: int) -> list[int]:
        passages = [
            f"{title}\n{''.join(text[: count // number]).rstrip()}"
            for title, text in zip(titles, texts, strict=True)
        ]
        return format.opening("\n\n".join([*passages, questions[0].text]))

    opening = _longest(format, render, length, questions, "documents")
    return converse(model, format, "documents", opening, questions, length)


def text_sample(
    model: AnswersModel, format: PromptFormat, length: int, rng: random.Random, index: int
) -> CalibrationSample:
    """Running text of exactly `length` tokens; the last ones, most of all, carry loss.

    At most `TEXT_TOKENS` of them, which see furthest back: their logits would take more memory
    than the model.
    """
    words = running_words(calibration_text(), rng, length)
    encoded = format.tokenizer("".join(words))["input_ids"]
    tokens = tuple(encoded[:length])
    span = (max(len(tokens) // 4, len(tokens) - TEXT_TOKENS), len(tokens))
    return CalibrationSample("text", length, tokens, (span,), (None,))


_MAKERS: Mapping[
    str, Callable[[AnswersModel, PromptFormat, int, random.Random, int], CalibrationSample]
] = {
    "retrieval": retrieval_sample,
    "quiz": quiz_sample,
    "documents": documents_sample,
    "text": text_sample,
}


def converse(
    model: AnswersModel,
    format: PromptFormat,
    domain: str,
    opening: list[int],
    questions: Sequence[Question],
    length: int,
) -> CalibrationSample:
    """Read `opening`, which asks the first question, then ask every other one that has room."""
    reader = DenseReader(model, format, capacity=length)
    spans: list[tuple[int, int]] = []
    correct: list[bool | None] = []
    values: list[tuple[int, int]] = []
    for question in questions:
        turn = format.turn(question.text) if spans else opening
        if spans and len(reader.tokens) + len(turn) + question.limit > length:
            continue
        reader.feed(turn)
        start = len(reader.tokens)
        reply = reader.answer(min(question.limit, length - start), sentence=question.sentence)
        spans.append((start, start + len(reply)))
        found = _said(question.value, format.decode(reply))
        correct.append(None if question.value is None else found is not None)
        if domain == "retrieval" and found is not None:
            first, end = _place(format, reply, found)
            values.append((start + first, start + end))
    return CalibrationSample(
        domain, length, tuple(reader.tokens), tuple(spans), tuple(correct), tuple(values)
    )


def _about(fact: Fact) -> Question:
    return Question(fact.question, _ANSWER_TOKENS, value=fact.value, sentence=True)


def _said(value: str | None, reply: str) -> re.Match[str] | None:
    return None if value is None else re.search(re.escape(value), reply, re.IGNORECASE)


def _place(format: PromptFormat, reply: Sequence[int], said: re.Match[str]) -> tuple[int, int]:
    """The tokens of `reply` that say it, the space before included: there it is decided."""
    told = [len(format.decode(reply[:count])) for count in range(len(reply) + 1)]
    start = len(said.string[: said.start()].rstrip())
    first = next(k for k, end in enumerate(told[1:]) if end > start)
    return first, next(k for k, end in enumerate(told) if end >= said.end())


def _title(words: Sequence[str]) -> str:
    return "".join(words[:5]).strip().rstrip(".,;:")


def _affordable(format: PromptFormat, facts: Sequence[Fact], length: int) -> list[Fact]:
    """As many facts as take two fifths of `length` with their questions, one at least."""
    chosen: list[Fact] = []
    room = length * 2 // 5
    for fact in facts:
        asked = len(format.turn(fact.question)) + _ANSWER_TOKENS
        room -= len(format.encode(fact.needle)) + asked
        if chosen and room < 0:
            break
        chosen.append(fact)
    return chosen


def _longest(
    format: PromptFormat,
    render: Callable[[int], list[int]],
    length: int,
    questions: Sequence[Question],
    domain: str,
) -> list[int]:
    """The longest opening that leaves room for every answer and every later question."""
    later = sum(len(format.turn(question.text)) for question in questions[1:])
    budget = length - later - sum(question.limit for question in questions)
    words = most_words(render, budget, length)
    if words < 1:
        least = len(render(1)) + length - budget
        raise UsageError(
            f"{length} tokens are too few for a {domain} calibration sample, which takes at "
            f"least {least}; plan longer lengths"
        )
    return render(words)
