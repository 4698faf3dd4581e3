"""LongEval lines: a register of lines, each with a number, and the number of one line asked for.

Protocol: LongEval's "lines" task, the last integer of a greedy answer of at most 100 tokens.
"""

from __future__ import annotations

from typing import Any

from moac.calibration.prompt import PromptFormat
from moac.evaluation.case import Case, answer_room, case_rng, fitted, gold_answer, last_integer
from moac.evaluation.wordings import SEEN
from moac.evaluation.words import keys

LONGEVAL_ANSWER_TOKENS = 100
LONGEVAL_WORDING = SEEN
"""Calibration's registers are asked for in LongEval's own words."""

_LARGEST = 50_000
_LEAST_LINE = 14  # tokens; no tokenizer writes a line in fewer

_INTRODUCTION = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' "
    "and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each "
    "line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will "
    "ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the "
    "record start:"
)
_QUESTION = (
    "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? "
    "I need the number."
)


def longeval(tokenizer: Any, length: int, seed: int, index: int, depth: float) -> Case:
    """Case `index`: the line asked for stands at `depth` of the record."""
    format, rng = PromptFormat(tokenizer), case_rng("longeval", length, seed, index)
    most = max(1, length // _LEAST_LINE)
    names = keys(rng, most)
    values = [rng.randint(1, _LARGEST) for _ in names]
    # The line asked for comes first here and moves to its depth once the count is known.
    asked, answer = names[0], str(values[0])
    lines = [
        f"line {name}: REGISTER_CONTENT is <{value}>"
        for name, value in zip(names, values, strict=True)
    ]

    def write(count: int) -> str:
        place = min(int(depth * count), count - 1)
        record = "\n".join([*lines[1 : place + 1], lines[0], *lines[place + 1 : count]])
        return f"{_INTRODUCTION}\n\n{record}\n\n{_QUESTION.format(key=asked)}"

    lead = f"The <REGISTER_CONTENT> in line {asked} is "
    gold = gold_answer(format, answer, lead=lead if format.has_template else f" {lead}")
    budget = length - answer_room(gold, LONGEVAL_ANSWER_TOKENS)
    return Case(
        prompt=fitted(format, write, task="longeval", budget=budget, most=most),
        gold=gold,
        limit=LONGEVAL_ANSWER_TOKENS,
        score=last_integer(answer),
        depth=depth,
    )
