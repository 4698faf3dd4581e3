"""`moac serve` as a process: what it refuses, what it says, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_serve import CHAT
from tiny import Compiled, moac_command

ROOT = Path(__file__).parents[1]


@contextmanager
def serving(
    package: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[str], int, list[str]]]:
    """The process, its port, and the lines that it said before it served."""
    arguments = ["serve", str(package), "--port", "0", *options]
    paths = [str(ROOT / name) for name in ("", "runtime", "kernels")]
    process = subprocess.Popen(
        [sys.executable, "-m", "moac_runtime", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.stderr is not None
    said = []
    while not (
        found := re.search(r"serving http://127\.0\.0\.1:(\d+)", line := process.stderr.readline())
    ):
        assert line, said
        said.append(line.rstrip("\n"))
    try:
        yield process, int(found[1]), said
    finally:
        process.kill()
        process.communicate()


def post(port: int, body: dict[str, Any], **headers: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    given = {"Content-Type": "application/json", **headers}
    connection.request("POST", CHAT, json.dumps(body), given)
    return connection


ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


def test_sigterm_lets_answers_end(tiny_package: Compiled) -> None:
    with serving(tiny_package.package, "--served-model-name", "mine") as (process, port, said):
        assert re.match(r"mine: torch \w+, at most 2048 tokens a sequence, sampling", said[0])
        connection = post(port, {**ASKED, "model": "mine", "stream": True, "max_tokens": 150})
        reply = connection.getresponse()
        first = reply.read(20)
        process.send_signal(signal.SIGTERM)
        text = (first + reply.read()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"stop"' in text or '"finish_reason":"length"' in text
        connection.close()
        assert process.wait(30) == 0
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read() == ""
        (line,) = process.stderr.read().splitlines()
    assert re.search(rf"POST {CHAT} status=200 .* finish=(stop|length) .* id=\w+$", line)


def test_keys_of_a_file_open_it(tiny_package: Compiled, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    with serving(tiny_package.package, "--api-key-file", str(keys)) as (process, port, _):
        found = []
        for headers in ({}, {"Authorization": "Bearer second"}):
            with closing(post(port, {**ASKED, "max_tokens": 1}, **headers)) as connection:
                reply = connection.getresponse()
                reply.read()
                found.append(reply.status)
        assert found == [401, 200]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["--port", "70000"], "--port must be 0 to 65535, got 70000", 2),
        (["--context", "0"], "--context must be 1 or more, got 0", 2),
        (["--context", "9999"], "--context is 9999, and this package opens at most 2048", 2),
        (["--max-kv-bytes", "much"], "'much' is not a size", 2),
        (["--max-kv-bytes", "10"], "and the limit is 10; raise --max-kv-bytes", 2),
        (["--api-key-file", "nowhere"], "the file of keys nowhere cannot be read", 2),
        (["--host", "203.0.113.7"], "203.0.113.7 port 8000 cannot be listened on", 1),
        (["--nonsense"], "unrecognized arguments: --nonsense (see moac serve --help)", 2),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    tiny_package: Compiled,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
    code: int,
) -> None:
    assert moac_command("serve", tiny_package.package, *options) == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert words in error[0]


def test_a_missing_extra_names_its_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = "moac_runtime.host.extras.find_spec"
    monkeypatch.setattr(there, lambda name: name != "uvicorn" or None)
    assert moac_command("serve", "nowhere") == 2
    assert capsys.readouterr().err == (
        "error: this command needs uvicorn, which is not installed; run: pip install "
        "'moac[serve]'\n"
    )


def test_an_empty_file_of_keys_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").write_text("\n")
    assert moac_command("serve", "nowhere", "--api-key-file", tmp_path / "keys") == 2
    assert "holds none; write one key a line" in capsys.readouterr().err


def test_the_runtime_s_commands_have_names(capsys: pytest.CaptureFixture[str]) -> None:
    from moac_runtime.commands import main

    assert main(["dance"]) == 2
    assert "give one of run, serve, chat" in capsys.readouterr().err
    assert main([]) == 2
