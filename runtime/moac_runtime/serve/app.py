"""The server's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Lifespan

from moac_runtime.serve.asked import no_model
from moac_runtime.serve.chat_completions import chat_completions
from moac_runtime.serve.completions import completions
from moac_runtime.serve.errors import ApiError
from moac_runtime.serve.guard import Guard
from moac_runtime.serve.metrics import RequestMetrics
from moac_runtime.serve.sending import refusal
from moac_runtime.serve.served import Served


def build_app(served: Served, *, origins: Sequence[str] = ()) -> Starlette:
    """The application; `origins`: pages of other servers that may ask from a browser."""
    app = guarded(
        [
            Route("/", page, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            *_answering(),
        ],
        keys=served.keys,
        metrics=served.metrics,
        origins=origins,
        lifespan=_running,
    )
    app.state.served = served
    return app


def bare_app(served: Served) -> Starlette:
    """What answers alone, for a door that keeps keys, ids and the log itself.

    Whoever runs it starts and closes `served.thread`.
    """
    app = Starlette(routes=_answering(), exception_handlers=HANDLERS)
    app.state.served = served
    return app


def guarded(
    routes: Sequence[BaseRoute],
    *,
    keys: Sequence[str],
    metrics: RequestMetrics,
    origins: Sequence[str],
    lifespan: Lifespan[Starlette],
) -> Starlette:
    """An application of `routes` behind `Guard` and, where `origins` are given, CORS."""
    middleware = [Middleware(Guard, keys=keys, metrics=metrics)]
    if origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            )
        )
    return Starlette(
        routes=routes, middleware=middleware, exception_handlers=HANDLERS, lifespan=lifespan
    )


def _answering() -> list[BaseRoute]:
    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", one_model, methods=["GET"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    ]


async def page(request: Request) -> Response:
    """The chat page."""
    text = files("moac_runtime.serve").joinpath("page.html").read_text(encoding="utf-8")
    policy = "default-src 'self' 'unsafe-inline'; img-src data:"
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


async def health(request: Request) -> Response:
    """Whether the engine's thread runs, and how many it serves."""
    thread = _served(request).thread
    alive = thread.is_alive()
    told = {
        "status": "ok" if alive else "down",
        "running": thread.state.running,
        "waiting": thread.state.waiting,
    }
    return JSONResponse(told, status_code=200 if alive else 503)


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(_served(request).metrics.text(), media_type="text/plain; version=0.0.4")


async def models(request: Request) -> Response:
    """The one model."""
    return JSONResponse({"object": "list", "data": [_served(request).about()]})


async def one_model(request: Request) -> Response:
    """The model by its name. Raises ApiError for another."""
    served, asked = _served(request), request.path_params["name"]
    if asked != served.name:
        raise no_model(asked, served.name)
    return JSONResponse(served.about())


def _served(request: Request) -> Served:
    served: Served = request.app.state.served
    return served


@asynccontextmanager
async def _running(app: Starlette) -> AsyncIterator[None]:
    """The engine's thread lives as long as the application."""
    served: Served = app.state.served
    served.thread.start()
    try:
        yield
    finally:
        served.thread.close()


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return refusal(error)


async def _not_found(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    if not isinstance(error, HTTPException):
        raise error
    told = f"there is no {request.method} {request.url.path} here; /v1/models is a start"
    return refusal(ApiError(error.status_code, told))


HANDLERS = {ApiError: _refused, HTTPException: _not_found}
