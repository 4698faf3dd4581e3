"""Replicas as processes that Ray runs: the same answers, and one of them killed in the middle."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from servers import Door
from test_serve import CHAT
from test_serve_command import serving
from test_signing import make_key
from tiny import Compiled

pytest.importorskip("ray", reason="needs the extra [ray]; make test-ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def package(tiny_package: Compiled) -> Path:
    return tiny_package.package


@pytest.fixture
def door(package: Path) -> Iterator[Door]:
    options = ("--replicas", "2", "--dtype", "float32", "--context", "2048")
    with serving(package, *options) as (process, port, said):
        assert said[0].startswith("out: torch float32, at most 2048 tokens")
        yield Door(port)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def asked(content: str, **rest: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "temperature": 0, "seed": 1, **rest}


def running(door: Door) -> dict[str, int]:
    """Sequences that run, by replica."""
    _, text, _ = door.ask("/metrics")
    lines = [line for line in text.splitlines() if line.startswith("moac_sequences_running{")]
    return {line.split('"')[1]: int(float(line.split()[1])) for line in lines}


def process_of(replica: str) -> int:
    """The process of a replica, which Ray names."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith(f"ray::ServeReplica:moac-{replica}:".encode()):
            return int(folder.name)
    raise AssertionError(f"replica {replica} has no process")


def begun(door: Door, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, str]:
    """A connection on which `body` is being answered, and the replica that does so."""
    connection = door.connect()
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    door.until(lambda: sum(running(door).values()) == 1)
    (home,) = (name for name, count in running(door).items() if count)
    return connection, home


def test_one_is_killed_and_the_other_goes_on(door: Door) -> None:
    long = asked("tell all", max_tokens=1500)
    wanted = door.ask(CHAT, long)[1]["choices"][0]["message"]

    # a stream says that it ends early
    connection, home = begun(door, {**long, "stream": True})
    with closing(connection):
        reply = connection.getresponse()
        reply.read(200)
        os.kill(process_of(home), signal.SIGKILL)
        lines = reply.read().decode().split("\n\n")
    assert '"code":"replica_ended"' in lines[-3]
    assert lines[-2] == "data: [DONE]"

    # the other replica gives the same answer
    status, found, _ = door.ask(CHAT, long)
    assert (status, found["choices"][0]["message"]) == (200, wanted)
    door.until(lambda: door.ask("/health")[1]["replicas"]["running"] == 2, seconds=120)

    # an answer of which nothing was sent yet is given by the other, and nobody notices
    connection, again = begun(door, long)
    with closing(connection):
        assert again == home  # it came back under its name
        os.kill(process_of(again), signal.SIGKILL)
        reply = connection.getresponse()
        assert json.loads(reply.read())["choices"][0]["message"] == wanted
    door.until(lambda: door.ask("/health")[1]["replicas"]["running"] == 2, seconds=120)


def test_one_that_is_killed_while_idle_holds_nobody_up(door: Door) -> None:
    os.kill(process_of("0"), signal.SIGKILL)
    assert door.ask("/health")[0] == 200
    for place in range(4):
        assert door.ask(CHAT, asked(f"number {place}", max_tokens=4))[0] == 200
    door.until(lambda: door.ask("/health")[1]["replicas"]["running"] == 2, seconds=120)


def test_a_client_that_leaves_ends_its_sequence_in_the_replica(door: Door) -> None:
    for stream in (True, False):
        connection, _ = begun(door, asked("tell all", max_tokens=1500, stream=stream))
        connection.close()
        door.until(lambda: sum(running(door).values()) == 0, seconds=5)
    _, text, _ = door.ask("/metrics")
    counts = [line for line in text.splitlines() if "sequences_cancelled_total{" in line]
    assert sum(float(line.split()[1]) for line in counts) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, where it is imported
def test_a_package_that_nobody_signed_ends_with_3(
    package: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from moac_runtime.commands import main

    make_key(tmp_path, "mine")
    asked = ["--replicas", "2", "--require-signature", str(tmp_path / "mine.pub")]
    assert main(["serve", str(package), *asked]) == 3
    assert "is not signed" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, where it is imported
def test_a_package_that_cannot_be_served_is_one_sentence(
    package: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from moac_runtime.commands import main

    assert main(["serve", str(package), "--replicas", "2", "--context", "9999"]) == 2
    error = capfd.readouterr().err.splitlines()
    assert error == [
        "error: --context is 9999, and this package opens at most 2048 tokens; give less, or "
        "compile it for more"
    ]
