"""A socket, and uvicorn on it until a signal ends it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from moac_runtime.errors import MoacError

_BACKLOG = 2048


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there; port 0 is any that is free. Raises MoacError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((host, port))
            made.listen(_BACKLOG)
        except OSError as error:
            reason = error.strerror or str(error)
            raise MoacError(
                f"{host} port {port} cannot be listened on ({reason}); choose another --port or "
                "--host"
            ) from None
        yield made


def serve(app: ASGIApp, listening: socket.socket, *, drain_s: int) -> int:
    """Serve until a signal ends it, and return its number.

    The first signal closes the door and lets answers under way end, for `drain_s` seconds at most;
    a second one ends them.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=drain_s,
        server_header=False,
    )
    server = _Server(config)
    server.run(sockets=[listening])
    return server.ended_by


class _Server(uvicorn.Server):
    """Notes the signal that ended it, where uvicorn would raise it once more."""

    ended_by = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Both signals end the server while it runs, and mean what they did before after it."""
        ending = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in ending}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second signal does not wait."""
        self.ended_by = sig
        self.force_exit = self.should_exit
        self.should_exit = True
