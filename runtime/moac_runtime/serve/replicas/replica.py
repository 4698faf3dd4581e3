"""One process's model, and what the door asks of it; Ray Serve makes and watches it."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncGenerator, MutableMapping
from dataclasses import dataclass
from typing import Any

from moac_runtime.backends.stranger import Build
from moac_runtime.errors import MoacError
from moac_runtime.host.shortage import shortage
from moac_runtime.serve.app import bare_app
from moac_runtime.serve.opened import open_served, told
from moac_runtime.serve.served import Served

Message = dict[str, Any]
"""What an ASGI application sends, or a note for the log (`NOTE`)."""
NOTE = "moac.note"
_PATIENCE_S = 30.0
"""For which a replica that cannot serve stays, so that the command can ask it why."""
_LESS_MEMORY = "lower --replicas, --max-kv-bytes or --kept-bytes, or end other programs"


@dataclass(frozen=True, slots=True)
class About:
    """What a replica opened, in lines for people. `fault`: why there is none."""

    lines: tuple[str, ...] = ()
    fault: str | None = None
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """A replica's sequences that run and wait, and its metrics in Prometheus's text format."""

    running: int
    waiting: int
    metrics: bytes


class Replica:
    """`options`: as `serve.command` reads them; `build`: as of `load`.

    A package that cannot be served is told by `about`: what a constructor raises, Ray would try
    again.
    """

    def __init__(self, options: argparse.Namespace, build: Build | None = None) -> None:
        self._began = time.monotonic()
        self._served: Served | None = None
        try:
            self._served = open_served(options, build=build)
        except Exception as error:
            self._about = _fault(error)
        else:
            self._about = About(tuple(told(self._served)))
            self._app = bare_app(self._served)
            self._served.thread.start()

    async def about(self) -> About:
        """What there is to tell before the first request."""
        return self._about

    async def tell(self) -> Standing:
        """How it stands."""
        state = self._opened.thread.state
        return Standing(state.running, state.waiting, self._opened.metrics.text())

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message]]:
        """What the application sends to a request, as it comes, and a note for the log.

        `scope`: the request's, as far as it can be sent. Whoever stops reading ends the answer.
        """
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        asked = {"type": "http", "asgi": {"version": "3.0"}, **scope}
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if given:
                return given.pop()
            return await asyncio.Future()  # the client's leaving cancels the answer as a whole

        async def send(message: MutableMapping[str, Any]) -> None:
            await sent.put(dict(message))

        answering = asyncio.ensure_future(self._app(asked, receive, send))
        answering.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while batch := await _batch(sent):
                if _ends(batch[-1]):  # after which nobody may listen
                    batch.insert(-1, {"type": NOTE, "note": asked.get(NOTE, {})})
                yield batch
            answering.result()
        finally:
            answering.cancel()

    async def check_health(self) -> None:
        """Raises MoacError where Ray is to make a new replica: this one cannot answer."""
        if self._served is None:
            if time.monotonic() - self._began > _PATIENCE_S:
                raise MoacError(self._about.fault or "")
        elif not self._served.thread.is_alive():
            raise MoacError("the engine's thread has ended; serve with --backend torch")

    @property
    def _opened(self) -> Served:
        if self._served is None:
            raise MoacError(self._about.fault or "the package is not open; start again")
        return self._served


async def _batch(sent: asyncio.Queue[Message | None]) -> list[Message]:
    """All messages at hand, at least one; none where there will be none."""
    found = [await sent.get()]
    while not sent.empty() and found[-1] is not None:
        found.append(sent.get_nowait())
    if found[-1] is None and len(found) > 1:
        sent.put_nowait(None)  # for the next call
    return [message for message in found if message is not None]


def _ends(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


def _fault(error: Exception) -> About:
    found = error if isinstance(error, MoacError) else shortage(error, _LESS_MEMORY)
    if found is None:
        raise error
    return About(fault=str(found), exit_code=found.exit_code)
