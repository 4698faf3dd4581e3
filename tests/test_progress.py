"""What long work shows on standard error: our own lines on a pipe, one bar on a terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from specs import plain_spec
from tiny import Compiled, moac_command, options, plan_options

from moac.calibration import CalibrationSample
from moac.pipeline import stages
from moac.pipeline.stages import Workbench, calibrate, profile
from moac.progress import progress
from moac.progress.eta import TimeLeft
from moac.progress.progress import passed, stage, step, whole
from moac.store.workspace import Workspace
from moac_runtime.package.spec import RopeSpec

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")

Capture = pytest.CaptureFixture[str]

TIME = r"(about|more than) (\d+ min( \d+ s)?|\d+ s) left"
LINE = re.compile(
    rf"[a-z]+: (started(, {TIME}( in all)?)?|{TIME}( in all)?|\d+ s so far|done in \d+\.\d s)"
)
STAGES = (
    *("load", "rehearse", "calibrate", "profile", "predict", "refine", "optimise", "validate"),
    *("emit", "verify"),
)


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from moac.cli.main import main; main()", *map(str, words)]


def plain_environment(**variables: str) -> dict[str, str]:
    """A user's, without what keeps libraries quiet in these tests."""
    ours = ("HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM", "NO_COLOR", "COLUMNS")
    kept = {name: text for name, text in os.environ.items() if name not in ours}
    path = os.pathsep.join(filter(None, sys.path))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def compile_words(tiny: Compiled, out: Path) -> list[object]:
    # another budget, so that of the stages all that solve run again
    chosen = (*options(budget=0.4), "--work-dir", tiny.work_dir)
    return ["compile", tiny.checkpoint, "-o", out, *chosen]


def on_a_terminal(words: Sequence[str], **variables: str) -> tuple[int, str]:
    """Exit code, and what a terminal was sent on standard error."""
    ours, theirs = pty.openpty()
    environment = plain_environment(**{"TERM": "xterm", "COLUMNS": "100", **variables})
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    sent = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        sent += piece
    os.close(ours)
    return running.wait(), sent.decode()


# ---- a compile


def test_a_pipe_is_sent_our_own_lines_alone(tiny_package: Compiled, tmp_path: Path) -> None:
    done = subprocess.run(
        command(*compile_words(tiny_package, tmp_path / "out")),
        capture_output=True,
        text=True,
        env=plain_environment(),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    for name in STAGES:
        assert any(line.startswith(f"{name}: started, about ") for line in lines), name
        assert any(line.startswith(f"{name}: done in ") for line in lines), name
    assert "in all" in lines[0]


def test_a_terminal_shows_one_bar(tiny_package: Compiled, tmp_path: Path) -> None:
    code, sent = on_a_terminal(command(*compile_words(tiny_package, tmp_path / "out")))
    assert code == 0, sent
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)
    assert re.search(rf"profile +━+.*{TIME} in all", text)
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    others = [line for line in lines if "━" not in line]
    assert others == [line for line in others if LINE.fullmatch(line)]
    assert [line.partition(":")[0] for line in others] == list(STAGES)
    assert not text.rstrip(" ").endswith("━")


def test_what_was_estimated_stands_beside_what_it_took(
    tiny_package: Compiled, tmp_path: Path, capsys: Capture
) -> None:
    assert moac_command(*compile_words(tiny_package, tmp_path / "out"), "--json") == 0
    told = json.loads(capsys.readouterr().out)["stages"]
    assert sorted(told) == sorted(STAGES)
    cost = json.loads((tmp_path / "out/build.json").read_text(encoding="utf-8"))
    for name in STAGES:
        assert told[name]["estimated_seconds"] == cost["estimated_seconds"][name]
        assert told[name]["seconds"] == cost["seconds"][name]
    assert cost["estimated_seconds"]["profile"] > 0


def test_a_plan_tells_it_too(tiny_package: Compiled, tmp_path: Path, capsys: Capture) -> None:
    words = [tiny_package.checkpoint, "-o", tmp_path / "p.json", *plan_options(budget=0.4)]
    assert moac_command("plan", *words, "--work-dir", tiny_package.work_dir, "--json") == 0
    out, err = capsys.readouterr()
    assert "in all" in err
    assert [line for line in err.splitlines() if not LINE.fullmatch(line)] == []
    assert json.loads(out)["stages"]["profile"]["estimated_seconds"] > 0
    assert "seconds" not in (tmp_path / "p.json").read_text(encoding="utf-8")


def test_all_that_was_planned_is_done_in_the_end(
    tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps say as much as was planned, so that the time left is right in between."""
    seen: list[tuple[str, str, float]] = []
    begun: dict[str, dict[str, float]] = {}
    consume, begin = TimeLeft.passed, TimeLeft.begin

    def passing(self: TimeLeft, kind: str, amount: float) -> None:
        seen.append((self._stage or "", kind, amount))
        consume(self, kind, amount)

    def beginning(self: TimeLeft, name: str, amounts: Any = None) -> None:
        begun[name] = {**self.work[name]}
        begin(self, name, amounts)

    monkeypatch.setattr(TimeLeft, "passed", passing)
    monkeypatch.setattr(TimeLeft, "begin", beginning)
    assert moac_command(*compile_words(tiny_package, tmp_path / "out")) == 0
    for name, planned in begun.items():
        for kind, amount in planned.items():
            done = sum(a for s, k, a in seen if (s, k) == (name, kind))
            # samples are no longer than their length, tiny plans less dense than they may be
            assert done >= 0.75 * amount, (name, kind)
            # a plan that loses less than the first is measured at another length too
            assert done <= 1.25 * amount or name == "validate", (name, kind)


# ---- stages and steps


def test_a_stage_alone_tells_its_own_time(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.02)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.02)
    with stage("evaluate", {"tokens": 30}):
        for _ in range(3):
            with step("tokens", 10):
                time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluate: started"
    assert re.fullmatch(r"evaluate: done in 0\.\d s", lines[-1])
    assert any(re.fullmatch(rf"evaluate: {TIME}", line) for line in lines)
    assert all(LINE.fullmatch(line) for line in lines)


def test_a_long_step_goes_on_telling(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.02)
    with whole(TimeLeft({"a": {"x": 1}, "b": {"x": 9}}, {"x": 2.0})), stage("a"), step("x", 1):
        time.sleep(0.4)
    found = re.findall(rf"^a: {TIME} in all$", capsys.readouterr().err, re.MULTILINE)
    assert len(found) >= 3


def test_work_that_fails_is_not_told_as_done(capsys: Capture) -> None:
    with pytest.raises(KeyboardInterrupt), stage("a", {"x": 1}), step("x", 1):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "a: started\n"
    with stage("b"):  # nothing of the first one is under way any more
        pass
    assert "b: done in 0.0 s" in capsys.readouterr().err


def test_steps_need_no_stage() -> None:
    with step("x", 1) as part:
        part(1, 2)
    passed("x", 1)


@pytest.mark.parametrize("width", ["40", "80", "200"])
def test_a_bar_fits_its_terminal(width: str) -> None:
    script = """
import time
from moac.progress.eta import TimeLeft
from moac.progress.progress import stage, step, whole
with whole(TimeLeft({"calibrate": {"x": 4}}, {"x": 200.0})), stage("calibrate"), step("x", 1):
    time.sleep(0.3)
"""
    code, sent = on_a_terminal([sys.executable, "-c", script], COLUMNS=width)
    assert code == 0, sent
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)
    assert max(map(len, re.split(r"[\r\n]+", text))) <= int(width)
    assert "Traceback" not in text


def test_standard_error_may_be_closed(tiny_package: Compiled, tmp_path: Path) -> None:
    words = command(*compile_words(tiny_package, tmp_path / "out"))
    line = " ".join(f"'{word}'" for word in words)
    done = subprocess.run(["bash", "-c", f"{line} 2>&-"], env=plain_environment(), check=False)
    assert done.returncode == 0


# ---- the order of work


def _bench(folder: Path) -> Workbench:
    spec = plain_spec(
        **{"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "vocab_size": 8},
        **{"hidden_size": 8, "intermediate_size": 8, "tied_embeddings": True, "context": 512},
        **{"rope": RopeSpec("default", 1e4, (1.0,) * 4)},
    )
    found: Any = SimpleNamespace(
        **{
            "checkpoint": SimpleNamespace(spec=spec),
            "model": SimpleNamespace(dtype=torch.float32),
        },
        **{"reader": SimpleNamespace(runs=""), "tokenizer": None, "workspace": Workspace(folder)},
        **{"request": SimpleNamespace(seed=0, calibration=None), "layout": SimpleNamespace()},
    )
    found.costs = stages.Costs(spec, 4)
    found.key = lambda kind, **parts: f"{kind}-{parts['length']}-{parts['domain']}"
    bench: Workbench = found
    return bench


def test_long_samples_are_made_first_and_returned_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[int, str]] = []

    def build(*_: Any, samples_per_length: Any, domains: Any, **__: Any) -> list[Any]:
        ((length, count),) = samples_per_length.items()
        made.append((length, domains[0]))
        return [CalibrationSample(domains[0], length, (1,), ((0, 1),), (None,))] * count

    monkeypatch.setattr(stages, "build_calibration", build)
    bench = _bench(tmp_path)
    samples = calibrate(bench, {512: {"retrieval": 2, "text": 1}, 1024: {"retrieval": 1}})
    assert made == [(1024, "retrieval"), (512, "retrieval"), (512, "text")]
    found = [(sample.length, sample.domain) for sample in samples]
    assert found == [(512, "retrieval"), (512, "retrieval"), (512, "text"), (1024, "retrieval")]


def test_long_samples_are_profiled_first_and_tables_stay_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profiled: list[int] = []

    def table(_: Any, sample: CalibrationSample, __: Any) -> torch.Tensor:
        profiled.append(len(sample.token_ids))
        return torch.tensor([len(sample.token_ids)])

    monkeypatch.setattr(stages, "_sample_table", table)
    samples = [
        CalibrationSample("text", n, tuple(range(n)), ((0, 1),), (None,)) for n in (8, 32, 16)
    ]
    tables = profile(_bench(tmp_path), samples)
    assert profiled == [32, 16, 8]
    assert [int(one) for one in tables] == [8, 32, 16]


# ---- an evaluation


def test_an_evaluation_weighs_its_cells_by_what_they_cost(
    tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[float] = []
    done: list[float] = []
    begin, passing = TimeLeft.begin, TimeLeft.passed

    def beginning(self: TimeLeft, name: str, amounts: Any = None) -> None:
        if name == "evaluate":
            begun.extend(amounts.values())
        begin(self, name, amounts)

    def consuming(self: TimeLeft, kind: str, amount: float) -> None:
        if self._stage == "evaluate":
            done.append(amount)
        passing(self, kind, amount)

    monkeypatch.setattr(TimeLeft, "begin", beginning)
    monkeypatch.setattr(TimeLeft, "passed", consuming)
    words = ["eval", tiny_package.package, "--source", tiny_package.checkpoint]
    words += ["--tasks", "passkey,nll", "--text", "prose", "--samples", "2", "--batch", "1"]
    words += ["--lengths", "512,768", "--against", "dense", "--work-dir", tmp_path / "work"]
    for _ in range(2):  # the second time all cells are kept
        done.clear()
        begun.clear()
        assert moac_command(*words) == 0
        assert len(begun) == 1
        assert sum(filter(None, done)) == pytest.approx(begun[0])
        assert max(done) > 1.2 * min(filter(None, done))
