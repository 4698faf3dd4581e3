"""A server of a package as a process, and timed requests to it or to another one."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moac_runtime.errors import MoacError

ROOT = Path(__file__).parents[1]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass
class Server:
    """`url`: of its root. `process`: None where somebody else started it. `said`: its log."""

    url: str
    process: subprocess.Popen[str] | None = None
    said: list[str] = field(default_factory=list)

    def connect(self) -> http.client.HTTPConnection:
        """A connection of its own for a request."""
        parts = urlsplit(self.url)
        return http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=600)

    def metric(self, name: str) -> float:
        """A value of `/metrics`. Raises MoacError where there is none."""
        connection = self.connect()
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        for line in lines:
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        raise MoacError(f"{self.url} tells no {name}; serve a package with moac serve")

    def resident_bytes(self) -> int:
        """Memory that the process has in use now, as Linux tells it."""
        if self.process is None:
            raise MoacError("the server is somebody else's process; serve the package here")
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


@contextmanager
def served(package: str, *options: str) -> Iterator[Server]:
    """`moac serve PACKAGE` on a free port. Raises MoacError where it does not come to serve."""
    paths = [str(ROOT), str(ROOT / "runtime"), str(ROOT / "kernels")]
    process = subprocess.Popen(
        [sys.executable, "-m", "moac_runtime", "serve", package, "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    server = Server("", process)
    began = threading.Event()
    reader = threading.Thread(target=_read_log, args=(server, began), daemon=True)
    reader.start()
    try:
        began.wait(300)
        if not server.url:
            raise MoacError(f"the server did not start: {' '.join(server.said)}")
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            reader.join(10)
            if process.stderr is not None:
                process.stderr.close()


def _read_log(server: Server, began: threading.Event) -> None:
    process = server.process
    if process is None or process.stderr is None:
        return
    for line in process.stderr:
        server.said.append(line.rstrip("\n"))
        if found := re.match(r"serving (http://\S+)", line):
            server.url = found[1]
            began.set()
    began.set()


@dataclass(frozen=True, slots=True)
class Reply:
    """`times`: seconds from the request to each piece of the answer; `seconds`: to its end."""

    status: int
    text: str
    usage: dict[str, Any]
    times: tuple[float, ...]
    seconds: float

    @property
    def first_s(self) -> float:
        """Seconds to the first piece."""
        return self.times[0] if self.times else self.seconds

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer."""
        return int(self.usage.get("completion_tokens", 0))

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def ask(server: Server, path: str, body: dict[str, Any]) -> Reply:
    """A streamed request, read to its end."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    connection = server.connect()
    began = time.perf_counter()
    connection.request("POST", path, json.dumps(asked), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    text, usage, times = "", {}, []
    if reply.status == 200:
        for event in _events(reply):
            piece = _piece(event)
            if piece:
                times.append(time.perf_counter() - began)
                text += piece
            usage = event.get("usage") or usage
    else:
        reply.read()
    connection.close()
    return Reply(reply.status, text, usage, tuple(times), time.perf_counter() - began)


def ask_all(server: Server, path: str, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
    """All at once, each from a client of its own."""
    found: list[Reply | None] = [None] * len(bodies)

    def one(place: int) -> None:
        found[place] = ask(server, path, bodies[place])

    clients = [threading.Thread(target=one, args=(place,)) for place in range(len(bodies))]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    replies = [reply for reply in found if reply is not None]
    if len(replies) < len(bodies):
        raise MoacError(f"{len(bodies) - len(replies)} clients got no reply; see the server's log")
    return replies


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := reply.readline():
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            return
        if data:
            yield json.loads(data)


def _piece(event: dict[str, Any]) -> str:
    for choice in event.get("choices", ()):
        return choice.get("text") or choice.get("delta", {}).get("content") or ""
    return ""
