"""`POST /v1/completions`: text that is gone on with, without the chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moac_runtime.engine.logprobs import TokenLogprobs
from moac_runtime.engine.request import Request as EngineRequest
from moac_runtime.engine.turn import Turn
from moac_runtime.errors import MoacError
from moac_runtime.serve.asked import Asked, check_model, likely_tokens, read_asked
from moac_runtime.serve.body import read_body
from moac_runtime.serve.chat_asked import choices
from moac_runtime.serve.errors import wrong
from moac_runtime.serve.exchange import Exchange
from moac_runtime.serve.fields import BodyFields
from moac_runtime.serve.log import note
from moac_runtime.serve.replies import Heading, completion_logprobs, finish_reason, usage
from moac_runtime.serve.sending import events, whole
from moac_runtime.serve.served import Served

_LENGTH = 16
"""Tokens of an answer where none are asked for, as OpenAI's."""


@dataclass(frozen=True, slots=True)
class CompletionAsked:
    """A request for each choice of each prompt, those of a prompt side by side."""

    asked: Asked
    requests: tuple[EngineRequest, ...]


async def completions(request: Request) -> Response:
    """Go on with a text. Raises ApiError."""
    served: Served = request.app.state.served
    fields = await read_body(request)
    check_model(fields, served.name)
    asked = read_completion(fields, served)
    exchange = Exchange(served.thread, asked.requests)
    reply = CompletionReply(served, asked, exchange, request)
    if asked.asked.stream:
        return events(exchange, reply.chunks())
    return await whole(request, exchange, reply.whole)


def read_completion(fields: BodyFields, served: Served) -> CompletionAsked:
    """Raises ApiError for what is not served or makes no sense."""
    limits = served.engine.limits
    asked = read_asked(fields, served.model, most=limits.context, length=_LENGTH)
    found = []
    for tokens in _prompts(fields, served):
        request = EngineRequest(
            tokens=tuple(tokens),
            options=asked.sampling.options,
            logprobs=likely_tokens(fields, "logprobs"),
        )
        served.check(request, "prompt")
        found += choices(request, asked.choices)
    return CompletionAsked(asked, tuple(found))


def _prompts(fields: BodyFields, served: Served) -> list[list[int]]:
    """Of one text, several, one list of tokens or several."""
    prompt: Any = fields.any("prompt")
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    found = [_tokens(one, served) for one in (prompt if several else [prompt])]
    known = served.model.spec.vocab_size
    for tokens in found:
        if not tokens or not all(0 <= token < known for token in tokens):
            raise wrong("prompt", f"prompt must hold tokens from 0 to {known - 1}, at least one")
    return found


def _tokens(prompt: Any, served: Served) -> list[int]:
    if isinstance(prompt, str):
        try:
            return served.model.tokenizer.encode(prompt, special=True)
        except MoacError as error:
            raise wrong("prompt", str(error)) from None
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise wrong("prompt", f"prompt must be text or a list of tokens, got {prompt!r:.60}")


class CompletionReply:
    """What becomes of one request."""

    def __init__(
        self, served: Served, asked: CompletionAsked, exchange: Exchange, request: Request
    ) -> None:
        self._served, self._asked, self._exchange = served, asked, exchange
        self._request = request
        self._turns: dict[int, Turn] = {}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The reply piece by piece."""
        heading = Heading("text_completion", self._served.name)
        asked = self._asked.asked
        rest = {"usage": None} if asked.include_usage else {}
        sent = [0] * len(self._asked.requests)
        async for news in self._exchange.news():
            told = self._logprobs(news.logprobs, sent[news.index]) if news.logprobs else None
            sent[news.index] += len(news.text)
            if news.text or told:
                yield heading.with_([_choice(news.index, news.text, told)], **rest)
            if news.end is not None:
                self._end(news.index, news.end)
                reason = finish_reason(news.end)
                yield heading.with_([_choice(news.index, "", None, reason)], **rest)
        if asked.include_usage:
            yield heading.with_([], usage=self._usage())

    async def whole(self) -> dict[str, Any]:
        """The reply at once."""
        count = len(self._asked.requests)
        texts = [""] * count
        found: list[list[TokenLogprobs]] = [[] for _ in range(count)]
        async for news in self._exchange.news():
            texts[news.index] += news.text
            found[news.index] += news.logprobs
            if news.end is not None:
                self._end(news.index, news.end)
        parts = [
            _choice(i, texts[i], self._logprobs(found[i], 0), finish_reason(self._turns[i]))
            for i in range(count)
        ]
        return Heading("text_completion", self._served.name).with_(parts, usage=self._usage())

    def _logprobs(self, found: Sequence[TokenLogprobs], offset: int) -> dict[str, Any] | None:
        if self._asked.requests[0].logprobs is None:
            return None
        return completion_logprobs(self._served.model.tokenizer, found, offset)

    def _end(self, index: int, turn: Turn) -> None:
        self._turns[index] = turn
        self._served.metrics.note(turn)
        note(self._request, self._turns, self._asked.asked.sampling)

    def _usage(self) -> dict[str, Any]:
        step = self._asked.asked.choices
        firsts = [self._turns[i] for i in range(0, len(self._asked.requests), step)]
        return usage(firsts, list(self._turns.values()))


def _choice(index: int, text: str, logprobs: Any, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
