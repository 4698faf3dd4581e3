"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moac_runtime.engine.logprobs import TokenLogprobs
from moac_runtime.engine.turn import Turn
from moac_runtime.serve.asked import check_model
from moac_runtime.serve.body import read_body
from moac_runtime.serve.chat_asked import ChatAsked, read_chat
from moac_runtime.serve.exchange import Exchange
from moac_runtime.serve.log import note
from moac_runtime.serve.replies import Heading, chat_logprobs, finish_reason, usage
from moac_runtime.serve.sending import events, whole
from moac_runtime.serve.served import Served
from moac_runtime.serve.tools import Delta, reader_of


async def chat_completions(request: Request) -> Response:
    """Answer a conversation. Raises ApiError."""
    served: Served = request.app.state.served
    fields = await read_body(request)
    check_model(fields, served.name)
    asked = read_chat(fields, served)
    exchange = Exchange(served.thread, asked.requests)
    reply = ChatReply(served, asked, exchange, request)
    if asked.asked.stream:
        return events(exchange, reply.chunks())
    return await whole(request, exchange, reply.whole)


class ChatReply:
    """What becomes of one request."""

    def __init__(
        self, served: Served, asked: ChatAsked, exchange: Exchange, request: Request
    ) -> None:
        self._served, self._asked, self._exchange = served, asked, exchange
        self._request = request
        count = len(asked.requests)
        self._readers = [reader_of(asked.tools, served.tool_style) for _ in range(count)]
        self._turns: dict[int, Turn] = {}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The reply piece by piece."""
        heading = Heading("chat.completion.chunk", self._served.name)
        asked = self._asked.asked
        rest = {"usage": None} if asked.include_usage else {}
        for index in range(len(self._readers)):
            yield heading.with_([_chunk(index, {"role": "assistant", "content": ""})], **rest)
        async for news in self._exchange.news():
            reader = self._readers[news.index]
            deltas = reader.push(news.text)
            if news.end is not None:
                self._end(news.index, news.end)
                deltas += reader.finish()
            for delta, found in self._with_logprobs(deltas, news.logprobs):
                yield heading.with_([_chunk(news.index, delta, logprobs=found)], **rest)
            if news.end is not None:
                reason = "tool_calls" if reader.called else finish_reason(news.end)
                yield heading.with_([_chunk(news.index, {}, reason)], **rest)
        if asked.include_usage:
            yield heading.with_([], usage=self._usage())

    async def whole(self) -> dict[str, Any]:
        """The reply at once."""
        count = len(self._readers)
        deltas: list[list[Delta]] = [[] for _ in range(count)]
        found: list[list[TokenLogprobs]] = [[] for _ in range(count)]
        async for news in self._exchange.news():
            deltas[news.index] += self._readers[news.index].push(news.text)
            found[news.index] += news.logprobs
            if news.end is not None:
                self._end(news.index, news.end)
                deltas[news.index] += self._readers[news.index].finish()
        choices = [self._choice(index, deltas[index], found[index]) for index in range(count)]
        heading = Heading("chat.completion", self._served.name)
        return heading.with_(choices, usage=self._usage())

    def _choice(
        self, index: int, deltas: Sequence[Delta], found: Sequence[TokenLogprobs]
    ) -> dict[str, Any]:
        content = "".join(delta.get("content", "") for delta in deltas)
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        plain = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        message = {"role": "assistant", "content": content if content or not calls else None}
        reason = "tool_calls" if calls else finish_reason(self._turns[index])
        return {
            "index": index,
            "message": {**message, "refusal": None, **({"tool_calls": plain} if plain else {})},
            "logprobs": self._logprobs(found),
            "finish_reason": reason,
        }

    def _with_logprobs(
        self, deltas: list[Delta], found: Sequence[TokenLogprobs]
    ) -> list[tuple[Delta, dict[str, Any] | None]]:
        """The tokens' log probabilities stand beside the first of what they brought."""
        if found and not deltas:
            deltas = [{"content": ""}]
        told = self._logprobs(found) if found else None
        return [(delta, None if place else told) for place, delta in enumerate(deltas)]

    def _logprobs(self, found: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self._asked.requests[0].logprobs is None:
            return None
        return chat_logprobs(self._served.model.tokenizer, found)

    def _end(self, index: int, turn: Turn) -> None:
        self._turns[index] = turn
        self._served.metrics.note(turn)
        note(self._request, self._turns, self._asked.asked.sampling)

    def _usage(self) -> dict[str, Any]:
        return usage([self._turns[0]], list(self._turns.values()))


def _chunk(
    index: int, delta: Delta, reason: str | None = None, *, logprobs: Any = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
