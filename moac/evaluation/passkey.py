"""Pass keys: a number hidden in held-out text or in filler, and asked for.

Protocol: MoA's passkey task, the first integer of a greedy answer. Chat models answer in a
sentence, so `PASSKEY_ANSWER_TOKENS` are allowed before the integer must be complete.
"""

from __future__ import annotations

import random
from typing import Any

from moac.calibration.haystack import Needle, haystack_words, hide
from moac.calibration.prompt import PromptFormat
from moac.evaluation.case import (
    Case,
    answer_room,
    case_rng,
    first_integer,
    fitted,
    gold_answer,
)
from moac.evaluation.text import held_out
from moac.evaluation.wordings import PASSKEY_WORDINGS, UNSEEN, Wording, WordingKind

PASSKEY_ANSWER_TOKENS = 24


def passkey(
    tokenizer: Any,
    length: int,
    seed: int,
    index: int,
    depth: float,
    wording: WordingKind = UNSEEN,
) -> Case:
    """Case `index` of one kind of wording; `length` tokens hold the prompt and the answer.

    Text and filler alternate, and a wording meets both. `depth`: where the needle stands, 0 to 1.
    Raises UsageError for too short a length.
    """
    format, rng = PromptFormat(tokenizer), case_rng(f"passkey/{wording}", length, seed, index)
    asked = passkey_wording(wording, length, seed, index)
    key = str(rng.randint(10 ** (asked.digits - 1), 10**asked.digits - 1))
    needle = Needle(asked.needle.format(key=key), depth)
    words = haystack_words(held_out("prose"), rng, length, filler=bool(index % 2))

    def write(count: int) -> str:
        return f"{asked.introduction}\n\n{hide(words[:count], [needle])}\n\n{asked.question}"

    # a plain prompt ends with "Answer:"
    lead = asked.lead if format.has_template else f" {asked.lead}"
    gold = gold_answer(format, key, lead=lead)
    budget = length - answer_room(gold, PASSKEY_ANSWER_TOKENS)
    return Case(
        prompt=fitted(format, write, task="passkey", budget=budget, most=length),
        gold=gold,
        limit=PASSKEY_ANSWER_TOKENS,
        score=first_integer(key),
        depth=depth,
    )


def passkey_wording(wording: WordingKind, length: int, seed: int, index: int) -> Wording:
    """The wording of case `index`: all of a kind before any comes again, in a drawn order.

    Each round starts one place later, so that a wording's haystack is the other one then.
    """
    pool = PASSKEY_WORDINGS[wording]
    order = random.Random(f"wordings/{wording}/{length}/{seed}").sample(pool, len(pool))
    return order[(index + index // len(pool)) % len(pool)]
