"""One HTTP request's sequences, as news that its handler awaits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from moac_runtime.engine.engine import QueueFull
from moac_runtime.engine.request import Request
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.serve.engine_thread import EngineThread, News
from moac_runtime.serve.errors import ApiError


class Exchange:
    """`requests`: the choices of one HTTP request. Raises ApiError where none can be taken."""

    def __init__(self, worker: EngineThread, requests: Sequence[Request]) -> None:
        self._worker = worker
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._left = len(requests)
        try:
            self._tickets = worker.submit(requests, self._tell)
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=1) from None

    async def news(self) -> AsyncIterator[News]:
        """Until every choice has ended. Raises ApiError where one fails."""
        while self._left:
            one = await self._news.get()
            if one.error is not None:
                raise failure(one.error)
            self._left -= one.last
            yield one

    def cancel(self) -> None:
        """Stop computing what is left, before the engine's next step."""
        if self._left:
            self._worker.cancel(self._tickets)
            self._left = 0

    def _tell(self, news: News) -> None:
        try:
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)
        except RuntimeError:  # the server's loop is closed: nobody is there to read
            return


def failure(error: MoacError) -> ApiError:
    """An engine's error as what the client is told."""
    status = 400 if isinstance(error, UsageError) else 500
    return ApiError(status, str(error), code=None if status == 400 else "engine_error")
