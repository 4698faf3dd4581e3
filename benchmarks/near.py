"""Which sampled answers the rounding of sums allows: those that draw each token near its number.

Beside other rows a prompt may be read in other pieces, and logits then differ by rounding. A
greedy answer is the same. A sampled one is the same but where the number that was drawn falls so
near the end of a token's interval of probability that the neighbouring token may take it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import numpy as np

from moac_runtime.backends.arrays import library_of
from moac_runtime.backends.session import Feed
from moac_runtime.engine.capacity import rung
from moac_runtime.engine.model import Model
from moac_runtime.engine.sampling import SamplingOptions, probabilities
from moac_runtime.engine.sequence import Answer


class Near:
    """Answers of `model`, whose logits may be off by `bound`, to chat requests with a seed.

    The requests filter nothing (top-k, top-p, min-p), since a filter has an edge of its own.
    """

    def __init__(self, model: Model, bound: float) -> None:
        self._model = model
        self._engine = model.engine()
        # Of a sum of probabilities c: logits off by e move it by c (1 - c) 2 e at most.
        self._reach = bound / 2

    def allows(self, body: Mapping[str, Any], text: str) -> bool:
        """Whether the answer `text` to a request's `body` is what was drawn, or near it."""
        options = self._options(body)
        prompt = self._model.tokenizer.encode_chat(body["messages"], parse_special=False)
        draw = Random(options.seed)
        drawn = [draw.random() for _ in range(options.max_tokens)]
        ways: list[tuple[int, ...]] = [()]
        while ways:
            way = ways.pop()
            for token in self._candidates(prompt, way, drawn[len(way)], options):
                answer = self._answer((*way, token), options)
                if answer.finish_reason is not None and answer.text == text:
                    return True
                if answer.finish_reason is None and text.startswith(answer.text):
                    ways.append((*way, token))
        return False

    def _options(self, body: Mapping[str, Any]) -> SamplingOptions:
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens")
        return self._model.sampling(**{name: body[name] for name in names}).options

    def _answer(self, tokens: Sequence[int], options: SamplingOptions) -> Answer:
        answer = Answer(self._model.tokenizer, (), limit=options.max_tokens)
        for token in tokens:
            answer.push(token)
        return answer

    def _candidates(
        self, prompt: Sequence[int], way: Sequence[int], drawn: float, options: SamplingOptions
    ) -> list[int]:
        """The tokens whose interval of the summed probabilities is within reach of `drawn`."""
        session = self._engine.session
        planned = len(prompt) + options.max_tokens
        row = session.admit(rung(planned, self._engine.limits.context))
        try:
            found = probabilities(session.step([Feed(row, [*prompt, *way])]), options)
        finally:
            session.release(row)
        ends = np.asarray(library_of(found).float64(found))[0].cumsum()
        ends /= ends[-1]
        begins = np.concatenate([[0.0], ends[:-1]])
        near = (begins - self._reach <= drawn) & (drawn <= ends + self._reach)
        return [int(token) for token in near.nonzero()[0]]
