"""A user's own task: JSONL of `{"prompt": "..."}` or `{"messages": [...]}` with an `"answer"`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moac.calibration.jsonl import UserSample, read_prompts, user_opening
from moac.calibration.prompt import PromptFormat
from moac.evaluation.case import Case, gold_answer, recall
from moac_runtime.errors import UsageError

OWN_ANSWER_TOKENS = 128


def read_own_task(path: Path) -> list[UserSample]:
    """The lines of `path`, each with its answer. Raises UsageError naming file and line."""
    lines = read_prompts(path, what="task", reply="answer")
    for line in lines:
        if line.response is None:
            raise UsageError(f'{line.source}: there is no "answer"; give the expected one')
    return lines


def own_cases(
    lines: Sequence[UserSample], tokenizer: Any, *, lengths: Sequence[int]
) -> dict[int, list[Case]]:
    """Cases by length: each line at the smallest of `lengths` that holds it and its answer.

    An answer is right where the model's contains it, case and white space aside. Raises
    UsageError for a line that no length holds.
    """
    format = PromptFormat(tokenizer)
    cases: dict[int, list[Case]] = {}
    for line in lines:
        case = _case(line, format)
        fitting = [length for length in lengths if length >= case.tokens]
        if not fitting:
            raise UsageError(
                f"{line.source}: the prompt and its answer take {case.tokens} tokens and the "
                f"longest length is {max(lengths)}; shorten it or evaluate at a longer length"
            )
        cases.setdefault(min(fitting), []).append(case)
    return cases


def _case(line: UserSample, format: PromptFormat) -> Case:
    answer = (line.response or "").strip()
    return Case(
        prompt=tuple(user_opening(line, format)),
        gold=gold_answer(format, answer if format.has_template else f" {answer}"),
        limit=OWN_ANSWER_TOKENS,
        score=recall([answer]),
        depth=None,
    )
