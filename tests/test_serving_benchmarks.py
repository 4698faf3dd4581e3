"""The soak and the benchmark of serving, on a tiny model."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmark_scripts  # noqa: F401 - puts the scripts on the path
import pytest
from engines import model
from tiny import Compiled

near = import_module("near")
soak = import_module("soak")
serving = import_module("serving")


def test_a_soak(
    tiny_package: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(tiny_package.package), "--requests", "60", "--clients", "4"]
    code = soak.main([*asked, "--out", str(tmp_path / "soak.json")])
    found = json.loads((tmp_path / "soak.json").read_text())
    flat = found["checks"].pop("memory flat after warm-up")  # too short a run to tell
    assert all(found["checks"].values()), found
    assert code == (0 if flat else 3)
    assert sum(found["counts"].values()) == 60
    assert set(found["counts"]) == {"whole", "left", "malformed"}


def test_what_serving_shows(
    tiny_package: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = str(tiny_package.package)
    sizes = ["--clients", "3", "--longest", "80", "--new-tokens", "5", "--chat-tokens", "200"]
    limit = ["--chats", "4", "--kv-limit", "1MiB", "--out", str(tmp_path / "out.json")]
    assert serving.main([package, *sizes, *limit, "--serve", "--dtype", "float32"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    clients = found["clients"][package]
    assert clients["same_answers"] == clients["requests"] == 3
    assert found["turns"]["second_turn"]["cached_tokens"] > 100
    assert found["turns"]["cold"]["cached_tokens"] < 100
    under = found["limit"][package]
    assert 0 < under["most_kv_bytes"] <= 2**20
    assert under["most_at_once"] >= 1


def sampled(seed: int, length: int = 12) -> dict[str, Any]:
    messages = [{"role": "user", "content": "a fox saw the red hen"}]
    return {"messages": messages, "max_tokens": length, "seed": seed, **soak._SAMPLED}


def answered(body: dict[str, Any]) -> str:
    (found,) = model().generate(
        [body["messages"]],
        capacity=512,
        **{name: body[name] for name in ("max_tokens", "seed", "temperature")},
    )
    return found.text


def test_without_rounding_what_was_drawn_is_allowed_alone() -> None:
    body = sampled(1)
    drawn, other = answered(body), answered(sampled(2))
    assert drawn != other
    for bound in (0.0, 1e-6):
        allowed = near.Near(model(), bound)
        assert allowed.allows(body, drawn)
        for wrong in (other, drawn + "a", drawn[:-1]):
            assert not allowed.allows(body, wrong)


def test_rounding_allows_the_tokens_that_a_number_lies_near() -> None:
    """Of logits that may be off by 2, any token may be drawn: probabilities by 1 at most."""
    body = sampled(1, length=1)
    other = next(
        text for seed in range(2, 9) if (text := answered(sampled(seed, 1))) != answered(body)
    )
    assert not near.Near(model(), 0.0).allows(body, other)
    assert near.Near(model(), 2.0).allows(body, other)
    least, most = 0.0, 2.0
    while most - least > 1e-3:  # by as much as the number lies away from the token's interval
        middle = (least + most) / 2
        if near.Near(model(), middle).allows(body, other):
            most = middle
        else:
            least = middle
    assert 0.001 < most < 1.99


def test_only_sampled_answers_may_differ_by_rounding(
    tiny_package: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = soak.Soak()
    known = soak.Known(sampled(3), "what was known")
    found.differing += [(known, "near"), (known, "near"), (known, "far")]
    monkeypatch.setattr(soak.Near, "allows", lambda self, body, text: text == "near")
    soak._judge(found, soak._options([str(tiny_package.package)]))
    assert found.counts["rounded"] == 2
    assert found.wrong == ["200: 'far', expected 'what was known', sampled"]
    reply = SimpleNamespace(status=200, text="another")
    monkeypatch.setattr(soak, "ask", lambda *_: reply)
    greedy = soak.Known({**sampled(3), "temperature": 0}, "what was known")
    asked, seen = (
        SimpleNamespace(choices=lambda *_: ["whole"], choice=lambda one: one[0]),
        soak.Soak(),
    )
    soak._one(None, asked, [greedy], seen)
    assert (len(seen.wrong), seen.differing) == (1, [])
    soak._one(None, asked, [known], seen)
    assert (len(seen.wrong), seen.differing) == (1, [(known, "another")])
