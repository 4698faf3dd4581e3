"""The door of a server of replicas: keys, ids, the log and the page, and who answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from moac_runtime.serve.app import guarded, page
from moac_runtime.serve.body import read_bytes
from moac_runtime.serve.errors import ApiError
from moac_runtime.serve.metrics import RequestMetrics
from moac_runtime.serve.replicas.merged import merged
from moac_runtime.serve.replicas.pool import Gone, Pool
from moac_runtime.serve.replicas.replica import NOTE, Message
from moac_runtime.serve.replicas.routing import key_of
from moac_runtime.serve.sending import DONE, event, while_connected

_SENT = ("method", "path", "raw_path", "query_string", "headers", "http_version", "scheme")
"""What a replica is told of a request, beside its body."""
_ENDED = "the replica ended while it answered; ask again"


def build_front(pool: Pool, keys: Sequence[str] = (), *, origins: Sequence[str] = ()) -> Starlette:
    """The application; `keys` and `origins` as those of `app.build_app`."""
    counted = RequestMetrics()

    async def health(request: Request) -> Response:
        """Whether any replica runs, and how many sequences all of them serve."""
        found = await pool.tell()
        told = {
            "status": "ok" if found else "down",
            "running": sum(one.running for one in found.values()),
            "waiting": sum(one.waiting for one in found.values()),
            "replicas": {"running": len(found), "of": len(pool)},
        }
        return JSONResponse(told, status_code=200 if found else 503)

    async def metrics(request: Request) -> Response:
        """For Prometheus: requests, and what each replica counts."""
        texts = {name: told.metrics for name, told in (await pool.tell()).items()}
        return Response(counted.text() + merged(texts), media_type="text/plain; version=0.0.4")

    async def forward(request: Request) -> ASGIApp:
        """What a replica answers."""
        body = await read_bytes(request)
        scope = {name: request.scope[name] for name in _SENT if name in request.scope}
        return Relay(pool.answer(key_of(body), scope, body))

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.ensure_future(pool.watch())
        yield
        watching.cancel()
        pool.close()

    routes = [
        Route("/", page, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/v1/models", forward, methods=["GET"]),
        Route("/v1/models/{name:path}", forward, methods=["GET"]),
        Route("/v1/completions", forward, methods=["POST"]),
        Route("/v1/chat/completions", forward, methods=["POST"]),
    ]
    return guarded(routes, keys=keys, metrics=counted, origins=origins, lifespan=running)


class Relay:
    """Sends on what a replica sends, until it ends or the client leaves."""

    def __init__(self, batches: AsyncGenerator[list[Message]]) -> None:
        self._batches = batches
        self._streams = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._relay(scope, send))

    async def _relay(self, scope: Scope, send: Send) -> None:
        try:
            async with aclosing(self._batches) as batches:
                async for batch in batches:
                    for message in batch:
                        await self._pass(message, scope, send)
        except Gone:
            if not self._streams:
                raise
            text = event(ApiError(500, _ENDED, code="replica_ended").body()) + DONE
            await send({"type": "http.response.body", "body": text.encode()})

    async def _pass(self, message: Message, scope: Scope, send: Send) -> None:
        if message["type"] == NOTE:
            if message["note"]:
                scope[NOTE] = message["note"]
            return
        if message["type"] == "http.response.start":
            kinds = dict(message["headers"])
            self._streams = kinds.get(b"content-type", b"").startswith(b"text/event-stream")
        await send(message)
