"""Servers in this process, each on a free port, and clients that speak to them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from engines import model
from starlette.applications import Starlette

from moac_runtime.engine.model import Model
from moac_runtime.serve.app import build_app
from moac_runtime.serve.listening import listen
from moac_runtime.serve.served import Served

NAME = "tiny"


@dataclass
class Door:
    """A server that runs: `port` on this machine."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or text) and headers of a reply; a body is sent as JSON."""
        connection = self.connect()
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if body is not None else {}
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        connection.request(
            method or ("GET" if body is None else "POST"), path, data, given | named
        )
        reply = connection.getresponse()
        text = reply.read().decode()
        found = {key.lower(): value for key, value in reply.getheaders()}
        connection.close()
        is_json = found.get("content-type", "").startswith("application/json")
        return reply.status, json.loads(text) if is_json else text, found

    def chat(self, content: Any = "hi", **fields: Any) -> tuple[int, Any]:
        """A chat completion of one message, or of the messages given."""
        messages = fields.pop("messages", [{"role": "user", "content": content}])
        status, found, _ = self.ask("/v1/chat/completions", {"messages": messages, **fields})
        return status, found

    def stream(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, which ends as it must."""
        _, text, headers = self.ask(path, {**body, "stream": True})
        assert headers["content-type"].startswith("text/event-stream")
        events = [event for event in text.split("\n\n") if event]
        assert events[-1] == "data: [DONE]"
        assert all(event.startswith("data: ") for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]

    def metric(self, name: str) -> float:
        """A value of `/metrics`."""
        _, text, _ = self.ask("/metrics")
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        return float(line.split()[1])

    def until(self, holds: Callable[[], bool], seconds: float = 20) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not come to hold"
            time.sleep(0.005)


@dataclass
class Running(Door):
    """A server of one model in this process."""

    served: Served


@contextmanager
def opened(app: Starlette) -> Iterator[Door]:
    """An application that is served until the block ends."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on")
    running = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as socket:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        found = Door(socket.getsockname()[1])
        found.until(lambda: running.started)
        try:
            yield found
        finally:
            running.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextmanager
def server(
    asked: Model | None = None,
    *,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    **limits: Any,
) -> Iterator[Running]:
    """A server of `asked`, else of a tiny model; `limits` are those of its engine."""
    made = asked or model()
    engine = made.engine(**{"kept_bytes": 2**26, "waiting": 64, **limits})
    served = Served(made, engine, NAME, keys)
    with opened(build_app(served, origins=origins)) as door:
        yield Running(door.port, served)
    assert engine.session.rows == ()
