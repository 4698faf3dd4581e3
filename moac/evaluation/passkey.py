"""Pass keys: a number hidden in held-out text or in filler, and asked for.

MoA's protocol, with the cases of `moac.calibration.passkey`: the first integer of a greedy answer.
"""

from __future__ import annotations

from typing import Any

from moac.calibration.passkey import PASSKEY_ANSWER_TOKENS, WORDINGS, passkey_case
from moac.calibration.prompt import PromptFormat
from moac.evaluation.case import Case, answer_room, first_integer, gold_answer

_FIRST_SEED = 1_000
_SEEDS_A_RUN = 1 << 20


def passkey(tokenizer: Any, length: int, seed: int, index: int, depth: float) -> Case:
    """Case `index` at `depth`; `length` tokens hold the prompt and the answer.

    Wordings alternate, and text and filler do so that each wording meets both.
    """
    format = PromptFormat(tokenizer)
    number = _FIRST_SEED + seed * _SEEDS_A_RUN + index
    lead = WORDINGS[number % len(WORDINGS)].needle.partition("{key}")[0]
    if not format.has_template:
        lead = f" {lead}"  # a plain prompt ends with "Answer:"
    longest = gold_answer(format, "99999", lead=lead)
    found = passkey_case(
        tokenizer,
        length - answer_room(longest, PASSKEY_ANSWER_TOKENS),
        depth,
        number,
        haystack="filler" if (index + index // len(WORDINGS)) % 2 else "text",
    )
    return Case(
        prompt=found.token_ids,
        gold=gold_answer(format, found.answer, lead=lead),
        limit=PASSKEY_ANSWER_TOKENS,
        score=first_integer(found.answer),
        depth=depth,
    )
