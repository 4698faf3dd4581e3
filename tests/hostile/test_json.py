"""JSON from others: what means two things, or more than can be held, is refused."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest

from moac_runtime.host.files import read_regular
from moac_runtime.package.json_text import MOST_BYTES, parse_json, read_json_file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "the key 'a' stands twice"),
        ("[NaN]", "NaN is no JSON number"),
        ("-Infinity", "-Infinity is no JSON number"),
        ("1e999", "the number 1e999 is too large"),
        ("-1e999", "too large"),
        ("1" * 41, "has 41 digits"),
        ("1" * 5000, "has 5000 digits"),
        ('"\\ud800"', "half of a surrogate pair"),
        ('{"\\udc00x": 1}', "half of a surrogate pair"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64 deep"),
        (b'"\xff"', "byte 2 (0xff) is not UTF-8"),
        (b"\xff\xfe\x00\xd8", "is not UTF-16"),
        ("", "Expecting value"),
        ("[1,]", "line 1 column"),
        ("[1] [2]", "Extra data"),
    ],
)
def test_what_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        parse_json(text)
    assert len(str(error.value)) < 200


def test_what_is_read() -> None:
    found = parse_json(b'\xef\xbb\xbf{"a": [1, -0.5, 1e-400, "\\ud83d\\ude00", null]}')
    assert found == {"a": [1, -0.5, 0.0, "\U0001f600", None]}
    assert parse_json(b"\xff\xfe[\0]\0") == []
    assert parse_json("[" * 64 + "]" * 64)


def test_a_text_that_is_too_long_is_not_parsed() -> None:
    with pytest.raises(ValueError, match="more than 16 MiB"):
        parse_json(b" " * (MOST_BYTES + 1))


# ---- files


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        read_json_file(tmp_path / "pipe")


def test_a_device_is_not_read() -> None:
    with pytest.raises(ValueError, match="no regular file"):
        read_regular(Path("/dev/zero"), 10)


def test_a_file_that_grows_while_it_is_read_has_an_end(tmp_path: Path) -> None:
    path, ended = tmp_path / "log", threading.Event()
    path.write_bytes(b"x" * 1000)

    def write() -> None:
        with path.open("ab") as file:
            while not ended.is_set() and file.tell() < 2**26:
                file.write(b"x" * 2**16)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for most in (2**20, 2**21, 2**22):
            while path.stat().st_size <= most:
                pass
            with pytest.raises(ValueError, match=f"more than {most >> 20} MiB"):
                read_regular(path, most)
    finally:
        ended.set()
        writer.join()
