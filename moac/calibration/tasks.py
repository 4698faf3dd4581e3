"""What calibration asks: facts to hide and find again, and documents to summarise and quote.

The kinds follow the field's retrieval protocols (passkey, key-value registers) in many wordings,
so that no one wording decides which heads look important.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

_T = TypeVar("_T")
_Draw: TypeAlias = Callable[[random.Random], _T]


@dataclass(frozen=True, slots=True)
class Fact:
    """A sentence to hide, the question about it, and the value a right answer contains."""

    needle: str
    question: str
    value: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the most tokens its answer may take, and the `value` a right one contains.

    `value` is None where nothing was planted. `sentence`: the answer ends with its first sentence.
    """

    text: str
    limit: int
    value: str | None = None
    sentence: bool = False


INTRODUCTIONS = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.",
    "Some special facts are hidden within the following text. Make sure to memorize them. I will "
    "quiz you about them afterwards.",
    "Read the text below carefully. A few short notes stand somewhere in it; you will be asked "
    "about them.",
    "Here is a long text with a few facts that do not belong to it. Remember these facts.",
    "The following document contains several codes and facts. Answer the questions after it.",
)

CLOSINGS = (
    "That is the end of the text. Now answer a question about the facts you memorized.",
    "Now answer a question about it with one short sentence.",
    "End of the text. Here is a question about one of the facts in it.",
    "",
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Alvarez Baker Castell Dimitrov Edwards Fontaine Greene Hoffman Ibrahim Jansen Keller Larsen "
    "Moreau Nakamura Olsen Petrov Quinn Rossi Santos Tanaka Underwood Vargas Weber Young Zimmer"
)
FIRST_NAMES = _words("Anna Bruno Clara David Elena Felix Grace Hugo Irene Jonas Karen Lucas")
COLOURS = _words("red blue green yellow purple orange silver white black golden")
OBJECTS = _words("lantern compass violin umbrella telescope kettle hammer mirror ladder basket")
PLACES = _words("attic cellar garden kitchen library stable tower chapel workshop boathouse")
CITIES = _words("Lisbon Vienna Oslo Cairo Lima Dublin Prague Athens Madrid Warsaw Ottawa Nairobi")
FRUITS = _words("apricot banana coconut grape kiwi lemon mango melon orange pear plum papaya")
ADJECTIVES = _words("brave calm clever eager fancy gentle happy jolly kind lively proud silly")
NOUNS = _words("badger canyon falcon forest harbor island meadow panther river rocket tiger")
NUMBERED = ("locker number", "serial number", "account number", "gate code", "parcel number")


def _number(rng: random.Random) -> str:
    return str(rng.randint(10_000, 99_999))


def _passkey(rng: random.Random) -> Fact:
    key = _number(rng)
    wordings = (
        (f"The pass key is {key}. Remember it. {key} is the pass key.", "What is the pass key?"),
        (
            f"The pass key is {key}. Remember it. {key} is the pass key.",
            "What is the pass key? Answer with the number only.",
        ),
        (
            f"The pass key is {key}. Do not forget that {key} is the pass key.",
            "What is the pass key that the text told you to remember?",
        ),
        (
            f"Please note that the secret pass key is {key}.",
            "What is the secret pass key mentioned in the text?",
        ),
    )
    return Fact(*rng.choice(wordings), key)


def _about(names: Sequence[str], value: _Draw[str], needle: str, question: str) -> _Draw[Fact]:
    """Facts of one wording: one of `names` and a `value` of it, as `{name}` and `{value}`."""

    def draw(rng: random.Random) -> Fact:
        name, told = rng.choice(names), value(rng)
        return Fact(needle.format(name=name, value=told), question.format(name=name), told)

    return draw


def _one_of(words: Sequence[str]) -> _Draw[str]:
    return lambda rng: rng.choice(words)


_stated_number = _about(
    NUMBERED,
    _number,
    "The {name} is {value}. Remember it. {value} is the {name}.",
    "What is the {name}?",
)
_magic_number = _about(
    CITIES,
    _number,
    "One of the special magic numbers for {name} is: {value}.",
    "What is the special magic number for {name}?",
)
_access_code = _about(
    NAMES, _number, "The access code of {name} is {value}.", "What is the access code of {name}?"
)
_telephone = _about(
    NAMES,
    _number,
    "The telephone number of Doctor {name} is {value}.",
    "What is the telephone number of Doctor {name}?",
)
_box = _about(
    COLOURS,
    _number,
    "The number on the {name} box is {value}.",
    "What is the number on the {name} box?",
)
_kept_place = _about(
    OBJECTS, _one_of(PLACES), "The {name} is kept in the {value}.", "Where is the {name} kept?"
)
_favourite_fruit = _about(
    FIRST_NAMES,
    _one_of(FRUITS),
    "The favourite fruit of {name} is {value}.",
    "What is the favourite fruit of {name}?",
)
_home = _about(
    FIRST_NAMES,
    _one_of(CITIES),
    "The home town of {name} is {value}.",
    "What is the home town of {name}?",
)


def _register(rng: random.Random) -> Fact:
    line, key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}", str(rng.randint(1_000, 50_000))
    return Fact(
        f"line {line}: REGISTER_CONTENT is <{key}>.",
        f"Tell me what is the REGISTER_CONTENT in line {line}? I need the number.",
        key,
    )


_KINDS: tuple[_Draw[Fact], ...] = (
    _passkey,
    _stated_number,
    _magic_number,
    _access_code,
    _telephone,
    _box,
    _kept_place,
    _favourite_fruit,
    _home,
    _register,
)
_CLASSIC = (_passkey, _stated_number)
_REGISTER_SHARE = 1 / 3  # small models misread registers, and then repeat their own mistake


def _repeated(fact: Fact, rng: random.Random) -> Fact:
    """Every second fact is said twice, as the classic pass key is."""
    if fact.needle.count(fact.value) > 1 or rng.random() < 0.5:
        return fact
    return Fact(f"{fact.needle} Remember it. {fact.needle}", fact.question, fact.value)


def draw_facts(rng: random.Random, count: int, *, classic: bool = False) -> list[Fact]:
    """`count` facts in random order, at most one pass key, no two with the same question.

    `classic`: the first is a pass key or a number hidden the same way.
    """
    facts: dict[str, Fact] = {}
    drawn = _KINDS if rng.random() < _REGISTER_SHARE else _KINDS[:-1]
    kinds = rng.sample(drawn, len(drawn))
    if classic:
        kinds.insert(0, kinds.pop(min(kinds.index(kind) for kind in _CLASSIC)))
    while len(facts) < count:
        kind = kinds[len(facts) % len(kinds)]
        if kind is _passkey and len(facts) >= len(kinds):
            kind = _access_code
        fact = _repeated(kind(rng), rng)
        facts.setdefault(fact.question, fact)
    found = list(facts.values())
    return found if classic else rng.sample(found, count)


def document_questions(rng: random.Random, openings: list[str]) -> list[Question]:
    """Quote and summary questions about numbered documents; `openings`: their first words."""
    numbers = rng.sample(range(len(openings)), len(openings))
    quoted = numbers[0]
    return [
        Question(
            f"Quote the first sentence of document {quoted + 1}.",
            40,
            value=openings[quoted],
            sentence=True,
        ),
        *(
            Question(f"Summarise document {number + 1} in one or two sentences.", 64)
            for number in numbers[1:]
        ),
    ]
