"""Replies on their way to a client who may go away: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moac_runtime.serve.errors import ApiError
from moac_runtime.serve.exchange import Exchange

DONE = "data: [DONE]\n\n"
_LEFT = 499  # what servers note of a client that went away


def refusal(error: ApiError) -> Response:
    """The reply to a request that is not served."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def whole(
    request: Request, exchange: Exchange, reply: Callable[[], Coroutine[Any, Any, dict[str, Any]]]
) -> Response:
    """The reply once it is there; where the client leaves before, computing stops."""
    made = asyncio.ensure_future(reply())
    gone = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            return Response(status_code=_LEFT)
        return JSONResponse(made.result())
    finally:
        exchange.cancel()
        for task in (made, gone):
            task.cancel()
        await asyncio.gather(made, gone, return_exceptions=True)


def events(exchange: Exchange, chunks: AsyncIterator[dict[str, Any]]) -> Response:
    """A stream of chunks; where the client leaves, computing stops."""

    async def written() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield event(chunk)
        except ApiError as error:
            yield event(error.body())
        yield DONE

    return _EventStream(written(), exchange)


class _EventStream(StreamingResponse):
    """Ends when the client leaves, also while there is nothing to send."""

    def __init__(self, content: AsyncIterator[str], exchange: Exchange) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self.stream_response(send))
        finally:
            self._exchange.cancel()


async def while_connected(receive: Receive, sending: Coroutine[Any, Any, None]) -> None:
    """Send until the client leaves, also while there is nothing to send."""
    sent = asyncio.ensure_future(sending)
    gone = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({sent, gone}, return_when=asyncio.FIRST_COMPLETED)
        if sent.done():
            sent.result()
    except OSError:  # the client left while something was being sent
        return
    finally:
        for task in (sent, gone):
            task.cancel()
        await asyncio.gather(sent, gone, return_exceptions=True)


async def until_gone(receive: Receive) -> None:
    """Wait for the client to leave."""
    while (await receive())["type"] != "http.disconnect":
        pass


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
