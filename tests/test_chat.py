"""A conversation: turns that read what is new, growth, files, and the command."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import model
from families import VOCAB
from safetensors import safe_open
from safetensors.numpy import save_file

from moac_runtime.chat_command import Conversation
from moac_runtime.engine.chat import Chat
from moac_runtime.errors import ArtifactError, UsageError
from moac_runtime.host.lines import Lines


def chat(**options: Any) -> Chat:
    return model(eos=VOCAB).chat(**{"max_tokens": 12, **options})


def cold(messages: list[dict[str, Any]], capacity: int) -> str:
    """The answer to a conversation that is read from its start."""
    return model(eos=VOCAB).generate([messages], max_tokens=12, capacity=capacity)[0].text


def test_turns_answer_as_cold_ones_and_read_what_is_new() -> None:
    talk = chat(system="You are terse.")
    for text in ("Name a fish.", "Another?", "And a bird?"):
        asked = [*talk.messages, {"role": "user", "content": text}]
        assert talk.say(text) == cold(asked, 512)
        assert talk.messages[-1]["role"] == "assistant"
    assert talk.last is not None
    assert 0 < talk.last.reused_tokens < talk.last.prompt_tokens
    assert talk.last.kv_bytes < talk.last.dense_bytes


def test_reset_and_system() -> None:
    talk = chat(system="a")
    first = talk.say("x")
    talk.say("y")
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "a"}]
    assert talk.say("x") == first
    talk.reset(system="b")
    assert talk.messages == [{"role": "system", "content": "b"}]


def test_a_conversation_grows_by_the_documented_rule() -> None:
    talk = chat(max_tokens=60)
    for _ in range(12):
        talk.say("the quick brown fox " * 4)
    assert talk._path is not None
    assert len(talk._path) > 1
    capacities = [size for size, _ in talk._path]
    assert capacities == sorted(capacities)
    assert talk.last is not None
    assert talk.last.capacity == capacities[-1] > 512
    assert talk.last.reused_tokens > 512  # it was not read again


def test_a_conversation_without_room_is_refused_and_goes_on_as_it_was() -> None:
    talk = chat(context=512)
    talk.say("a")
    before = list(talk.messages)
    with pytest.raises(UsageError, match=r"the prompt has .* tokens, and prompt and answer"):
        talk.stream("the quick brown fox " * 200)
    assert talk.messages == before
    assert talk.say("b")


def test_an_interrupted_answer_joins_with_what_it_has() -> None:
    talk = chat(max_tokens=40)
    stream = talk.stream("hi")
    first = next(stream)
    stream.interrupt()
    assert talk.messages[-1]["content"].startswith(first)
    assert talk.last is not None
    assert talk.last.finish_reason == "interrupted"
    assert talk.say("go on")


def test_a_saved_chat_goes_on_token_for_token(tmp_path: Path) -> None:
    file = tmp_path / "chat.safetensors"
    talk = chat(system="You are terse.")
    talk.say("Name a fish.")
    talk.save(file)
    wanted = talk.say("Another?")
    other = chat()
    other.load(file)
    assert other.system == "You are terse."
    assert other.say("Another?") == wanted
    assert other.last is not None
    assert talk.last is not None
    assert other.last.reused_tokens == talk.last.reused_tokens > 0


def test_a_grown_chat_is_saved_too(tmp_path: Path) -> None:
    file = tmp_path / "chat.safetensors"
    talk = chat(max_tokens=60)
    while talk._path is None or len(talk._path) < 2:
        talk.say("the quick brown fox " * 4)
    talk.save(file)
    wanted = talk.say("Another?")
    other = chat(max_tokens=60)
    other.load(file)
    assert other.say("Another?") == wanted
    assert other.last is not None
    assert other.last.reused_tokens > 256


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    with safe_open(file, framework="np") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = dict(opened.metadata())
    change(tensors, metadata)
    save_file(tensors, file, metadata=metadata)


# more tokens than the smallest span holds at 512
LONG = "Name a fish, please, and say at length why it is one, in words of your own. " * 2

HOSTILE: list[tuple[Callable[[Any, Any], None], str]] = [
    (lambda t, m: m.update(package="1" * 64), "has package '1111"),
    (lambda t, m: m.update(dtype="bfloat16"), "has dtype 'bfloat16', expected 'float32'"),
    (lambda t, m: m.update(format="other"), "has format 'other'"),
    (lambda t, m: m.update(path="[[512, 5]]"), "has the path"),
    (lambda t, m: m.update(path="[[1000000000, 0]]"), "has the path"),
    (lambda t, m: m.update(path="[[1024, 0], [512, 3]]"), "has the path"),
    (lambda t, m: m.update(path="[[1024, 0]]"), "bytes, expected"),
    (lambda t, m: m.update(messages="{"), "no chat that was saved whole"),
    (lambda t, m: m.update(messages="[1]"), "no chat that was saved whole"),
    (lambda t, m: m.pop("messages"), "no chat that was saved whole"),
    (lambda t, m: t.pop("kv"), "no chat that was saved whole"),
    (lambda t, m: t.update(kv=t["kv"][:-1]), "bytes, expected"),
    (lambda t, m: t.update(tokens=np.zeros(9000, np.int32)), "has the path"),
]


@pytest.mark.parametrize(("change", "match"), HOSTILE)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, change: Callable[[Any, Any], None], match: str
) -> None:
    file = tmp_path / "chat.safetensors"
    talk = chat()
    talk.say(LONG)
    talk.save(file)
    rewritten(file, change)
    before = list(talk.messages)
    with pytest.raises(ArtifactError, match=match):
        talk.load(file)
    assert talk.messages == before
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ArtifactError, match="no chat that was saved whole"):
        talk.load(file)


def test_a_path_with_a_wrong_growth_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "chat.safetensors"
    talk = chat()
    talk.say(LONG)
    talk.save(file)
    rewritten(file, lambda t, m: m.update(path=json.dumps([[512, 0], [1024, 600]])))
    with pytest.raises(ArtifactError, match="has the path"):
        talk.load(file)


# ---- the command


def talk_through(monkeypatch: pytest.MonkeyPatch, text: str, **options: Any) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return Conversation(chat(**options), Lines()).run()


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "c.safetensors"
    typed = ["hi", "/stats", "/set max_tokens=3", "again", f"/save {file}", f"/load {file}"]
    typed += ["/reset", "/help", "/exit", "not read"]
    assert talk_through(monkeypatch, "\n".join(typed)) == 0
    out, err = capsys.readouterr()
    assert out.startswith(cold([{"role": "user", "content": "hi"}], 512))
    assert "prompt " in err
    assert "answer 12 tokens" in err
    assert "/save FILE" in err
    assert file.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/nonsense", "there is no command /nonsense; /help lists them"),
        ("/set speed=3", "/set takes NAME=VALUE with one of temperature, "),
        ("/set temperature=warm", "'warm' is no value of temperature; give a number"),
        ("/set temperature=-1", "temperature must be >= 0, got -1.0"),
        ("/save", "/save takes the name of a file"),
        ("/load nowhere", "there is no file nowhere; name one that /save wrote"),
        ("/save no/where", "no/where cannot be written"),
        ("/stats", "there is no answer yet; ask something"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_the_talk_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    assert talk_through(monkeypatch, f"{line}\nhi\n", max_tokens=4) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert words in err
    assert out == cold([{"role": "user", "content": "hi"}], 512)[: len(out) - 1] + "\n"


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("a\nb\n", ["a", "b"]),
        ("a\\\nb\n", ["a\nb"]),
        ('"""a\nb"""\nc\n', ["a\nb", "c"]),
        ('"""\na\n\nb\n"""\n', ["a\n\nb"]),
        ('"""a', ["a"]),
        ("a", ["a"]),
        ("a\\", ["a"]),
    ],
)
def test_texts_of_many_lines(
    monkeypatch: pytest.MonkeyPatch, typed: str, texts: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    lines, found = Lines(), []
    while (text := lines.read()) is not None:
        found.append(text)
    assert found == texts
