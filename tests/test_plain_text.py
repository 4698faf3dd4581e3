"""Text from files and pipes: marks, line ends, and the prompts made of them."""

from __future__ import annotations

import codecs
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_command import Loader, loader  # noqa: F401 - a fixture
from tiny import Compiled, moac_command

from moac.calibration.jsonl import read_calibration
from moac.evaluation.own_task import read_own_task
from moac_runtime.backends.session import Feed
from moac_runtime.command import main
from moac_runtime.text.plain_text import decode_prompt, decode_text

QUESTION = "What is the capital of France?"
WAYS = {
    "echo": f"{QUESTION}\n".encode(),
    "nothing": QUESTION.encode(),
    "windows": f"{QUESTION}\r\n".encode(),
    "mark": codecs.BOM_UTF8 + f"{QUESTION}\n".encode(),
    "powershell": codecs.BOM_UTF16_LE + f"{QUESTION}\r\n".encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + f"{QUESTION}\n".encode("utf-16-be"),
    "utf-32": f"{QUESTION}\n".encode("utf-32"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_is_what_was_written(way: str) -> None:
    assert decode_prompt(WAYS[way]) == QUESTION


def test_one_line_end_closes_the_last_line_and_others_stay() -> None:
    assert decode_prompt(b"\n first\r\n\r\nlast \n\n") == "\n first\n\nlast \n"
    assert decode_prompt(b"\n") == decode_prompt(b"") == ""
    assert decode_text(b"kept\n") == "kept\n"
    assert decode_text("a\rb\u2028c\ufeff".encode()) == "a\rb\u2028c\ufeff"


@pytest.mark.parametrize("chat", [[], ["--raw"]])
@pytest.mark.parametrize("way", WAYS)
def test_pipe_file_and_argument_give_the_same_tokens(
    way: str,
    chat: list[str],
    loader: Loader,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "prompt").write_bytes(WAYS[way])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(WAYS[way])))
    asked = ["--prompt", QUESTION, "--prompt-file", str(tmp_path / "prompt"), "--prompt", "-"]
    prompts: list[list[int]] = []
    open_session = loader.model._open_session

    def spy(capacity: int) -> Any:
        session: Any = open_session(capacity)
        step = session.step

        def told(feeds: Sequence[Feed]) -> Any:
            prompts.extend(list(feed.tokens) for feed in feeds)
            return step(feeds)

        session.step = told
        return session

    monkeypatch.setattr(loader.model, "_open_session", spy)
    assert main(["out", *asked, "--max-tokens", "1", *chat]) == 0
    assert prompts[0] == prompts[1] == prompts[2]


@pytest.mark.parametrize(
    ("data", "encoding"), [(b"caf\xe9", "UTF-8"), (codecs.BOM_UTF16_LE + b"a", "UTF-16-LE")]
)
def test_a_broken_file_is_told_with_its_encoding(
    data: bytes,
    encoding: str,
    loader: Loader,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompt").write_bytes(data)
    assert main(["out", "--prompt-file", str(tmp_path / "prompt")]) == 2
    assert f"prompt is not {encoding} text" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_jsonl_of_any_editor(encoding: str, end: str, tmp_path: Path) -> None:
    lines = [{"prompt": "one"}, {"prompt": "two"}]
    text = "".join(json.dumps(line) + end for line in lines)
    (tmp_path / "own.jsonl").write_bytes(text.encode(encoding))
    assert [s.prompt for s in read_calibration(tmp_path / "own.jsonl")] == ["one", "two"]
    (tmp_path / "task.jsonl").write_bytes(text.replace("}", ', "answer": "x"}').encode(encoding))
    assert [s.response for s in read_own_task(tmp_path / "task.jsonl")] == ["x", "x"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_plan_with_a_byte_order_mark(
    encoding: str, tiny_package: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tiny_package.package / "plan.json").read_text(encoding="utf-8")
    (tmp_path / "plan.json").write_bytes(text.encode(encoding))
    assert moac_command("diff", tmp_path / "plan.json", tiny_package.package, "--json") == 0
    assert json.loads(capsys.readouterr().out)["same_spans"] is True
    asked = ["compile", tiny_package.checkpoint, "-o", tmp_path / "out", "--target", "torch"]
    assert moac_command(*asked, "--plan", tmp_path / "plan.json", "--dry-run") == 0
