"""Around every request: its id, who may ask, the line in the log, and faults told as JSON."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from moac_runtime.serve.errors import ApiError
from moac_runtime.serve.log import LOG, write_line
from moac_runtime.serve.metrics import RequestMetrics
from moac_runtime.serve.sending import refusal

_OPEN = ("/", "/health", "/favicon.ico")
"""Paths that tell nothing and need no key."""
_ID = re.compile(r"[\w.:-]{1,128}")


class Guard:
    """`keys`: any of them opens the server; none are needed where there are none."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], metrics: RequestMetrics) -> None:
        self._app, self._keys, self._metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, headers = time.perf_counter(), Headers(scope=scope)
        name = _request_id(headers)
        status = 0

        async def named(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            await self._answer(scope, headers, receive, named)
        except Exception:
            LOG.exception("request %s failed", name)
            if not status:
                fault = ApiError(500, "the server failed; its log tells why", code="internal")
                await refusal(fault)(scope, receive, named)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.count(_known(scope), status or 499)
            level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO
            if LOG.isEnabledFor(level):
                write_line(scope, name=name, status=status or 499, seconds=seconds)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        if self._keys and scope["path"] not in _OPEN and scope["method"] != "OPTIONS":
            try:
                check_key(headers.get("authorization", ""), self._keys)
            except ApiError as error:
                return await refusal(error)(scope, receive, send)
        await self._app(scope, receive, send)


def check_key(authorization: str, keys: Sequence[str]) -> None:
    """Raises ApiError unless the header holds one of `keys`; takes as long for any wrong one."""
    kind, _, given = authorization.partition(" ")
    found = [hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) for key in keys]
    if kind.lower() != "bearer" or not any(found):
        raise ApiError(
            401,
            "the API key is missing or wrong; send it as Authorization: Bearer KEY",
            code="invalid_api_key",
        )


def _request_id(headers: Headers) -> str:
    """The client's own, where it is one; else a new one."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def _known(scope: Scope) -> str:
    """The path, or what stands for paths that do not exist: labels must not grow for ever."""
    if "endpoint" not in scope:
        return "other"
    return "/v1/models/{name}" if scope.get("path_params") else str(scope["path"])
