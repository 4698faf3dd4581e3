"""Parsers of what a user gives in files: calibration, tasks, results of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from families import tiny_tokenizer
from guard import Target
from mutate import hostile_bytes, hostile_json
from packages import Package

from moac.calibration import read_calibration
from moac.calibration.jsonl import UserSample, user_opening
from moac.calibration.prompt import PromptFormat
from moac.evaluation.own_task import read_own_task
from moac.show.damage import telling_damage
from moac.show.inspection import inspect_package
from moac.show.report import read_evaluation, render_report

_CALL = {"type": "function", "id": "a", "function": {"name": "f", "arguments": '{"a": 1}'}}


def _lines(reply: str) -> list[str]:
    user = {"role": "user", "content": "What is the pass key? <|im_end|>"}
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    called = {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [_CALL]}
    talk = [
        {"role": "system", "content": "Be brief."},
        user,
        called,
        {"role": "tool", "content": "1"},
    ]
    found = [{"prompt": "The key"}, {"messages": [user]}, {"messages": [*talk, parts]}]
    return [json.dumps({**one, reply: "12345"}) for one in found]


def _reader(reply: str, read: Callable[[Path], list[UserSample]]) -> Callable[[Path], Target]:
    def target(folder: Path) -> Target:
        path, lines, format = folder / "lines.jsonl", _lines(reply), PromptFormat(tiny_tokenizer())

        def make(rng: Random) -> bytes:
            chosen = [rng.choice(lines) for _ in range(rng.randint(1, 3))]
            chosen[0] = hostile_json(rng, chosen[0])
            rng.shuffle(chosen)
            data = rng.choice(("\n", "\r\n", "\n\n", "\r", "\u2028")).join(chosen)
            found = data.encode("utf-8", "surrogatepass")
            return hostile_bytes(rng, found) if rng.random() < 0.2 else found

        def ran(data: bytes) -> None:
            path.write_bytes(data)
            for sample in read(path):
                user_opening(sample, format)

        return Target("\n".join(lines).encode(), make, ran)

    return target


def evaluation(folder: Path) -> Target:
    """The results of `moac eval --json` that `moac report --eval` shows."""
    package = Package(folder / "package")
    found = inspect_package(package.root)
    density = {"moac": found["density"], "dense": {n: 1.0 for n in found["density"]}}
    result = {"task": "passkey", "length": 64, "metric": "exact_match", "n": 4, "wording": "seen"}
    results = [
        {**result, "method": method, "value": 0.5, "ci95": [0.4, 0.6], "depth": depth}
        for method in density
        for depth in (None, 0.5)
    ]
    run = {
        "date": "2026-11-29",
        "seed": 0,
        "versions": {},
        "intervals": {},
        "machine": {"device": "cpu", "processor": "x86_64", "threads": 2},
    }
    whole = {"package": {"identity": "0" * 64}, "density": density, "results": results, **run}
    text, path = json.dumps(whole), folder / "results.json"

    def ran(data: bytes) -> None:
        path.write_bytes(data)
        with telling_damage(path):
            render_report(found, read_evaluation(path, found))

    def make(rng: Random) -> bytes:
        return hostile_json(rng, text).encode("utf-8", "surrogatepass")

    return Target(text.encode(), make, ran)


PARSERS: dict[str, Callable[[Path], Target]] = {
    "calibration": _reader("response", read_calibration),
    "task": _reader("answer", read_own_task),
    "evaluation": evaluation,
}
