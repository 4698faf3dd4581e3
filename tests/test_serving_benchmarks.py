"""The soak and the benchmark of serving, on a tiny model."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import benchmark_scripts  # noqa: F401 - puts the scripts on the path
import pytest
from tiny import Compiled

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
