"""The eleven RULER tasks that can be made offline (arXiv 2404.06654); scored by substring recall.

RULER's own templates, counts and answer lengths. Haystacks are this project's: the passkey filler
("noise"), held-out text ("essay") or nothing but needles. The two question answering tasks need
data sets and are left out. The answer's opening words stand in the prompt, as in RULER.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from moac.calibration.haystack import Needle, haystack_words, hide
from moac.calibration.prompt import PromptFormat
from moac.evaluation.case import Case, answer_room, case_rng, fitted, gold_answer, recall
from moac.evaluation.text import held_out
from moac.evaluation.wordings import SEEN, UNSEEN, WordingKind
from moac.evaluation.words import keys, vocabulary

NeedleKind = Literal["number", "uuid"]
Haystack = Literal["noise", "essay", "needles"]

_NIAH_TOKENS, _VARIABLES_TOKENS, _COMMON_TOKENS, _FREQUENT_TOKENS = 128, 30, 120, 50
_LEAST_NEEDLE = 12  # tokens; no tokenizer writes a needle in fewer


@dataclass(frozen=True, slots=True)
class Niah:
    """A needle-in-a-haystack task: how many keys stand in the text, values a key has, are asked.

    `keyed`: what the keys are. `haystack` "needles": the whole text is made of other needles.
    """

    haystack: Haystack
    values: NeedleKind = "number"
    keyed: Literal["word", "uuid"] = "word"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", values="uuid"),
    "niah_multikey_1": Niah("essay", num_keys=4),
    "niah_multikey_2": Niah("needles"),
    "niah_multikey_3": Niah("needles", values="uuid", keyed="uuid"),
    "niah_multivalue": Niah("essay", num_values=4),
    "niah_multiquery": Niah("essay", num_keys=4, num_queries=4),
}


@dataclass(frozen=True, slots=True)
class _Question:
    """What a task puts around its text: `write(count)` gives the whole user turn."""

    task: str
    write: Callable[[int], str]
    most: int
    prefix: str
    answers: tuple[str, ...]
    limit: int
    depth: float | None = None


def ruler(tokenizer: Any, task: str, length: int, seed: int, index: int, depth: float) -> Case:
    """Case `index` of one of `RULER_TASKS`; `length` tokens hold the prompt and the answer.

    `depth` places the needle of the tasks that ask for one. Raises UsageError for too short a
    length.
    """
    format, rng = PromptFormat(tokenizer), case_rng(task, length, seed, index)
    question = _QUESTIONS[task](rng, length, depth)
    gold = gold_answer(format, " " + ", ".join(question.answers))
    return Case(
        prompt=fitted(
            format,
            question.write,
            task=task,
            budget=length - answer_room(gold, question.limit),
            most=question.most,
            prefix=question.prefix if format.has_template else f" {question.prefix}",
        ),
        gold=gold,
        limit=question.limit,
        score=recall(question.answers),
        depth=question.depth,
    )


def _niah(task: str, rng: random.Random, length: int, depth: float) -> _Question:
    kind = NIAH[task]
    rows = length // _LEAST_NEEDLE if kind.haystack == "needles" else kind.num_keys
    names = _names(rng, kind.keyed, max(rows, 1))
    asked = names[: kind.num_queries]
    values = {name: [_value(rng, kind.values) for _ in range(kind.num_values)] for name in names}
    spread = _depths(rng, kind, depth)
    many = kind.num_queries * kind.num_values > 1
    what = f"{kind.values}s" if many else kind.values
    named = ", and ".join([", ".join(asked[:-1]), asked[-1]] if many and asked[1:] else asked)

    def write(count: int) -> str:
        if kind.haystack == "needles":
            text = _needles_only(kind, names[:count], values, depth)
        else:
            facts = [_fact(kind, name, value) for name in names for value in values[name]]
            needles = [Needle(text, at) for text, at in zip(facts, spread, strict=True)]
            text = hide(words[:count], needles)
        return _NIAH_TEMPLATE[many].format(what=what, text=text, asked=named)

    words = haystack_words(held_out("prose"), rng, length, filler=kind.haystack == "noise")
    return _Question(
        task=task,
        write=write,
        most=rows if kind.haystack == "needles" else length,
        prefix=_NIAH_PREFIX[many].format(what=what, asked=named),
        answers=tuple(value for name in asked for value in values[name]),
        limit=_NIAH_TOKENS,
        depth=None if many else depth,
    )


_NIAH_TEMPLATE = {
    False: (
        "A special magic {what} is hidden within the following text. Make sure to memorize it. I "
        "will quiz you about the {what} afterwards.\n{text}\nWhat is the special magic {what} "
        "for {asked} mentioned in the provided text?"
    ),
    True: (
        "Some special magic {what} are hidden within the following text. Make sure to memorize "
        "it. I will quiz you about the {what} afterwards.\n{text}\nWhat are all the special magic "
        "{what} for {asked} mentioned in the provided text?"
    ),
}
_NIAH_PREFIX = {
    False: "The special magic {what} for {asked} mentioned in the provided text is",
    True: "The special magic {what} for {asked} mentioned in the provided text are",
}


def _fact(kind: Niah, name: str, value: str) -> str:
    return f"One of the special magic {kind.values}s for {name} is: {value}."


def _needles_only(
    kind: Niah, names: Sequence[str], values: dict[str, list[str]], depth: float
) -> str:
    """Every name's needle; the first, which is asked for, stands at `depth`."""
    facts = [_fact(kind, name, values[name][0]) for name in names]
    place = min(int(depth * len(facts)), len(facts) - 1)
    return " ".join([*facts[1 : place + 1], facts[0], *facts[place + 1 :]])


def _names(rng: random.Random, keyed: str, count: int) -> list[str]:
    return keys(rng, count) if keyed == "word" else [_uuid(rng) for _ in range(count)]


def _value(rng: random.Random, kind: NeedleKind) -> str:
    return str(rng.randint(1_000_000, 9_999_999)) if kind == "number" else _uuid(rng)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _depths(rng: random.Random, kind: Niah, depth: float) -> list[float]:
    """Where the needles stand: the first at `depth`, the others at random."""
    others = kind.num_keys * kind.num_values - 1
    return [depth, *(rng.random() for _ in range(others))]


def _variables(rng: random.Random, length: int, depth: float) -> _Question:
    """Variable tracking: one chain of assignments, four hops, hidden in noise."""
    value, names, chain = _chain(rng)
    spread = sorted(rng.random() for _ in chain)
    words = haystack_words(held_out("prose"), rng, length, filler=True)
    shown_value, shown_names, shown = _chain(rng)

    def write(count: int) -> str:
        text = hide(
            words[:count], [Needle(line, at) for line, at in zip(chain, spread, strict=True)]
        )
        example = _VARIABLES.format(text=" ".join(shown), value=shown_value)
        solved = f"{_VARIABLES_PREFIX.format(value=shown_value)} {' '.join(shown_names)}"
        return f"{example}\n{solved}\n\n{_VARIABLES.format(text=text, value=value)}"

    return _Question(
        task="vt",
        write=write,
        most=length,
        prefix=_VARIABLES_PREFIX.format(value=value),
        answers=names,
        limit=_VARIABLES_TOKENS,
    )


_VARIABLES = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{text}\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
_VARIABLES_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are "
    "assigned the value {value}, they are:"
)


def _chain(rng: random.Random) -> tuple[str, tuple[str, ...], list[str]]:
    """A value, five variables that hold it, and the five assignments that say so."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choices(letters, k=5))
        names.extend([] if name in names else [name])
    value = str(rng.randint(10_000, 99_999))
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    return value, tuple(names), lines


def _common_words(rng: random.Random, length: int, depth: float) -> _Question:
    """Common words: ten words stand often in a numbered list, the others seldom."""
    long = length >= 4096
    often, seldom = (30, 3) if long else (6, 1)
    pool = rng.sample(vocabulary(), len(vocabulary()))
    example = _numbered(
        rng, pool[:10], pool[10 : 40 if long else 20], *((10, 3) if long else (3, 1))
    )
    common, rest = pool[40:50], [*pool[50:], *_coded(rng, length // 8)[1:]]
    order = rng.getrandbits(32)
    shown = _COMMON.format(text=example) + f"\n{_COMMON_PREFIX} {_listed(pool[:10])}"

    def write(count: int) -> str:
        # The same shuffle for every count, so that prompts grow with it.
        text = _numbered(random.Random(order), common, rest[: count - 1], often, seldom)
        return f"{shown}\n\n{_COMMON.format(text=text)}"

    return _Question(
        task="cwe",
        write=write,
        most=len(rest) + 1,
        prefix=_COMMON_PREFIX,
        answers=tuple(common),
        limit=_COMMON_TOKENS,
    )


_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{text}\nQuestion: What are the 10 most common "
    "words in the above list?"
)
_COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"


def _numbered(
    rng: random.Random, common: Sequence[str], rest: Sequence[str], often: int, seldom: int
) -> str:
    words = [*list(common) * often, *list(rest) * seldom]
    rng.shuffle(words)
    return _listed(words)


def _listed(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def _frequent_words(rng: random.Random, length: int, depth: float) -> _Question:
    """Frequent words: made-up words whose counts follow a zeta law; the three after the dots."""
    coded = _coded(rng, max(4, length // 50))
    weights = [1 / rank**_ZETA for rank in range(1, len(coded) + 1)]
    total = sum(weights)
    order = rng.getrandbits(32)

    def write(count: int) -> str:
        words = [
            word
            for word, weight in zip(coded, weights, strict=True)
            for _ in range(_frequency(count, weight / total))
        ]
        random.Random(order).shuffle(words)
        return _FREQUENT.format(text=" ".join(words))

    return _Question(
        task="fwe",
        write=write,
        most=length,
        prefix=_FREQUENT_PREFIX,
        answers=tuple(coded[1:4]),
        limit=_FREQUENT_TOKENS,
    )


_ZETA = 2.0
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {text}\nQuestion: Do not provide any explanation. "
    "Please ignore the dots '....'. What are the three most frequently appeared words in the "
    "above coded text?"
)
_FREQUENT_PREFIX = (
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)


def _frequency(count: int, share: float) -> int:
    return round(count * share)


def _coded(rng: random.Random, count: int) -> list[str]:
    """`count` different words of six random letters, behind the dots that stand most often."""
    words: dict[str, None] = {"....": None}
    while len(words) < count:
        words["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))] = None
    return list(words)


_QUESTIONS: dict[str, Callable[[random.Random, int, float], _Question]] = {
    **{task: partial(_niah, task) for task in NIAH},
    "vt": _variables,
    "cwe": _common_words,
    "fwe": _frequent_words,
}

RULER_TASKS = tuple(_QUESTIONS)

RULER_WORDINGS: Mapping[str, WordingKind] = {
    task: SEEN if task in NIAH else UNSEEN for task in RULER_TASKS
}
"""Calibration hides "magic numbers" in the words of RULER's needles; the others are all new."""
