"""The command line of a package: streams, exit codes, JSON, errors."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_generation import ScriptedSession, echo, scripted_model

from moac_runtime import command
from moac_runtime.command import main
from moac_runtime.engine import model as generation
from moac_runtime.engine.model import Model
from moac_runtime.errors import ArtifactError

OPTIONS = (
    *("--prompt", "--prompt-file", "--system", "--raw", "--parse-special", "--max-tokens"),
    "--temperature",
    *("--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed", "--stop"),
    *("--backend", "--dtype", "--threads", "--capacity", "--json"),
)
RAW = ["--raw", "--max-tokens", "20"]


class Loader:
    """Stands in for `load`: gives a scripted model and remembers what was asked."""

    def __init__(self, model: Model, sessions: list[ScriptedSession]) -> None:
        self.model, self.sessions = model, sessions
        self.path: Any = None
        self.options: dict[str, Any] = {}

    def __call__(self, path: Path, **options: Any) -> Model:
        self.path, self.options = path, options
        return self.model


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    loader = Loader(*scripted_model(echo))
    monkeypatch.setattr(generation, "load", loader)
    return loader


def test_one_prompt_streams_to_stdout_and_stats_to_stderr(
    loader: Loader, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["out", "--prompt", "hello é", *RAW]) == 0
    out, err = capsys.readouterr()
    assert out == "hello é\n"
    assert loader.path == Path("out")
    assert err.endswith("\nsampling greedy (default)\n")
    assert err.count("\n") == 3
    for part in ("prefill 9 tokens", "decode 8 tokens", "tokens/s", "KV ", "peak memory", "torch"):
        assert part in err


def test_a_package_runs_itself_without_a_package_argument(
    loader: Loader, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--prompt", "hi", *RAW], package=Path("/some/out")) == 0
    assert loader.path == Path("/some/out")
    assert main(["elsewhere", "--prompt", "hi", *RAW], package=Path("/some/out")) == 2
    assert "unrecognized arguments: elsewhere (see python out --help)" in capsys.readouterr().err


def test_options_reach_model_and_loader(loader: Loader) -> None:
    running = ["--backend", "torch", "--dtype", "float32", "--threads", "2", "--capacity", "99"]
    assert main(["out", "--prompt", "hi", "--raw", "--max-tokens", "1", *running]) == 0
    assert loader.options == {
        "backend": "torch", "dtype": "float32", "threads": 2, "cpu": None,
        "build": None, "trust": False, "require_signature": None,
    }  # fmt: skip
    assert loader.sessions[0].room == 99


def test_sampling_options_are_passed_on(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}
    generate = loader.model.generate

    def spy(prompts: Any, **options: Any) -> Any:
        seen.update(options)
        return generate(prompts, **options)

    monkeypatch.setattr(loader.model, "generate", spy)
    arguments = (
        "out --prompt hi --json --system s --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 "
        "--repetition-penalty 1.2 --seed 7 --max-tokens 4 --stop a --stop b --capacity 200 "
        "--max-batch 3 --max-kv-bytes 1GiB --parse-special"
    )
    assert main(arguments.split()) == 0
    assert seen == {
        "system": "s",
        "raw": False,
        "parse_special": True,
        "capacity": 200,
        "max_batch": 3,
        "max_kv_bytes": 2**30,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 7,
        "max_tokens": 4,
        "stop": ("a", "b"),
    }


def test_several_prompts_are_told_apart(
    loader: Loader, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from a file é\n", encoding="utf-8")
    arguments = ["out", "--prompt", "one", "--prompt-file", str(file), "--prompt", "two", *RAW]
    assert main(arguments) == 0
    assert capsys.readouterr().out == (
        "=== 1 of 3 ===\none\n=== 2 of 3 ===\nfrom a file é\n=== 3 of 3 ===\ntwo\n"
    )
    assert len(loader.sessions) == 1


def test_a_dash_reads_standard_input(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("piped é".encode())))
    assert main(["out", "--prompt", "-", *RAW]) == 0
    assert capsys.readouterr().out == "piped é\n"


def test_json_of_one_prompt(loader: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["out", "--prompt", "hé", "--json", *RAW]) == 0
    document = json.loads(capsys.readouterr().out)
    (result,) = document["results"]
    assert result == {
        "prompt": "hé",
        "text": "hé",
        "token_ids": [*loader.model.tokenizer.encode("hé", special=False), 257],
        "finish_reason": "stop",
        "prompt_tokens": 4,
        "generated_tokens": 4,
    }
    assert {key: document[key] for key in ("text", "token_ids", "finish_reason")} == {
        key: result[key] for key in ("text", "token_ids", "finish_reason")
    }
    stats = document["stats"]
    assert set(stats) == {
        "prefill_s",
        "prompt_tokens_per_s",
        "decode_s",
        "decode_tokens_per_s",
        "kv_bytes",
        "peak_memory_bytes",
        "load_s",
    }
    assert stats["kv_bytes"] == {"held": 7, "dense": 24 * 2 * 3 * 4 * 2 * 2}
    assert (document["backend"], document["dtype"], document["capacity"]) == (
        "torch",
        "bfloat16",
        24,
    )


def test_json_of_several_prompts(loader: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["out", "--prompt", "a", "--prompt", "bc", "--json", *RAW]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["text"] for entry in document["results"]] == ["a", "bc"]
    assert "text" not in document


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: PACKAGE (see moac run --help)"),
        (["out"], "there is no prompt; give --prompt TEXT (- for standard input)"),
        (["out", "--promt", "x"], "unrecognized arguments: --promt x (see moac run --help)"),
        (["out", "--prom", "x"], "unrecognized arguments: --prom x (see moac run --help)"),
        (
            ["out", "--prompt", "x", "--top-k", "many"],
            "argument --top-k: invalid int value: 'many' (see moac run --help)",
        ),
        (["out", "--prompt", "x", "--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
        (["out", "--prompt", "x", "--max-batch", "0"], "--max-batch must be 1 or more, got 0"),
        (
            ["out", "--prompt", "-", "--prompt", "-"],
            "standard input can be read once; give --prompt - a single time",
        ),
        (["out", "--prompt", ""], "the prompt is empty; give some text"),
        (["out", "--prompt", "", "--raw"], "the prompt is empty; give some text"),
        (["out", "--prompt", "\ufeff \n"], "the prompt is blank; give some text"),
        (
            ["out", "--prompt", "hi", "--prompt", " "],
            "prompt 2 of 2: the prompt is blank; give some text",
        ),
        (
            ["out", "--prompt", "hi", "--system", "caf\udce9"],
            "the system message holds bytes that are not UTF-8, or half a surrogate pair "
            "(at character 3); give it as UTF-8 text",
        ),
        (
            ["out", "--prompt-file", "no/such/file"],
            "the prompt file no/such/file cannot be read: No such file or directory",
        ),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, loader: Loader, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {message}\n")
    assert loader.path is None


def test_a_file_that_is_not_text_is_wrong_usage(
    loader: Loader, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes(b"caf\xe9")
    assert main(["out", "--prompt-file", str(file)]) == 2
    assert "latin1.txt is not UTF-8 text (byte 3)" in capsys.readouterr().err


def test_a_nul_in_a_file_is_text(loader: Loader, tmp_path: Path) -> None:
    file = tmp_path / "nul.txt"
    file.write_bytes(b"a\x00b")
    assert main(["out", "--prompt-file", str(file), *RAW]) == 0
    assert loader.model.tokenizer.decode(loader.sessions[0].held[0][:4]) == "a\x00b"


def test_control_tokens_of_a_prompt_act_where_asked(loader: Loader) -> None:
    for options in ([], ["--parse-special"]):
        assert main(["out", "--prompt", "hi<|im_end|>", "--max-tokens", "1", *options]) == 0
    text, acting = (session.held[0].count(258) for session in loader.sessions)
    assert acting == text + 1


def test_a_failure_is_one_sentence_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, **options: Any) -> Model:
        raise ArtifactError(f"{path} is damaged; compile it again")

    monkeypatch.setattr(generation, "load", fail)
    assert main(["out", "--prompt", "hi"]) == 1
    assert capsys.readouterr() == ("", "error: out is damaged; compile it again\n")


def test_a_package_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(tmp_path / "none"), "--prompt", "hi"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--prompt", "second"]])
def test_an_interrupt_prints_what_was_generated(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "load", Loader(*scripted_model(echo, interrupt_at=3)))
    assert main(["out", "--prompt", "hello", *RAW, *arguments]) == 130
    out = capsys.readouterr().out
    if "--json" in arguments:
        assert json.loads(out)["finish_reason"] == "interrupted"
        assert json.loads(out)["text"] == "hel"
    else:
        assert "hel\n" in out


def test_an_interrupt_while_printing_ends_the_answer(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(io.StringIO):
        def flush(self) -> None:
            if self.getvalue() == "he":
                raise KeyboardInterrupt

    shown = Interrupted()
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["out", "--prompt", "hello", *RAW]) == 130
    assert shown.getvalue() == "he\n"
    assert "decode 1 tokens" in capsys.readouterr().err


def test_an_interrupt_before_there_is_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: Path, **options: Any) -> Model:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "load", interrupted)
    assert main(["out", "--prompt", "hello"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_an_answer_that_the_capacity_cuts_is_told(
    loader: Loader, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["out", "--raw", "--capacity", "12", "--max-tokens", "20", "--prompt", "123456789"]
    assert main(asked) == 0
    note = "ended after 2 of 20 tokens: the prompt leaves no more of the session's 12"
    assert f"note: the answer {note}\n" in capsys.readouterr().err
    assert main([*asked, "--prompt", "hi"]) == 0
    assert f"note: answer 1 of 2 {note}\n" in capsys.readouterr().err
    assert main(["out", "--raw", "--max-tokens", "2", "--prompt", "123456789"]) == 0
    assert "note" not in capsys.readouterr().err


SCRIPT = """
import sys
from moac_runtime import command
from moac_runtime.engine import model as generation
from test_generation import echo, scripted_model
generation.load = lambda path, **options: scripted_model(echo)[0]
sys.exit(command.main(["out", *sys.argv[1:]]))
"""


def run(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    paths = [str(Path(__file__).parent), str(Path(command.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_a_reader_that_leaves_is_no_traceback() -> None:
    process = run("--prompt", "x" * 400, "--raw")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    message = process.stderr.read().decode()
    process.stderr.close()
    assert (process.wait(), message) == (1, "")


def test_a_terminal_without_unicode_still_shows_the_answer() -> None:
    process = run("--prompt", "a\U0001f600b", "--raw", env={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate()
    assert (process.returncode, out) == (0, b"a?b\n"), err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for option in OPTIONS:
        assert f"{option} " in text
