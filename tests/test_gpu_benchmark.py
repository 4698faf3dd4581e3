"""benchmarks/gpu.py rehearsed without a GPU, and how it judges what it measured."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

attempted = import_module("on_gpu.setting").attempted
verdicts = import_module("on_gpu.verdicts").verdicts


def rehearse(out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What a rehearsal writes, and what it prints."""
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--interpret"),
            *("--out", out, *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def test_a_rehearsal_of_layers_and_decode(tmp_path: Path) -> None:
    found, table = rehearse(tmp_path / "out.json", "--only", "layers,decode", "--cases", "1")
    assert found["device"] == "interpreter"
    assert found["forms"] == ["source"]
    assert [row["section"] for row in found["rows"]] == ["layers", *["decode"] * 6]
    assert found["rows"][0]["failed"] == 0
    assert "| prefill at density 1, times as fast as SDPA | >= 1.0 | not measured |  |" in table


@pytest.mark.slow
def test_a_rehearsal_runs_every_path(tmp_path: Path) -> None:
    tool = tmp_path / "sanitizer"
    tool.write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    arguments = ("--sanitizer", str(tool), "--seconds", "1e6")
    found, _ = rehearse(tmp_path / "out.json", *arguments)
    assert not [row for row in found["rows"] if row.get("failed")]
    systems = {row["system"]: row for row in found["rows"] if row["section"] == "steps"}
    assert list(systems) == ["moac", "dense", "uniform", "hf", "hf-static", "hf-uniform"]
    held = {name: row["kv_bytes"] for name, row in systems.items()}
    assert held["moac"] < held["dense"] == held["hf"]
    assert held["uniform"] == held["hf-uniform"] < held["dense"]
    assert {row["section"] for row in found["rows"]} == {
        *("layers", "families", "packages", "sanitizer", "decode", "prefill", "steps")
    }
    assert "failed" in next(row for row in found["rows"] if row["section"] == "sanitizer")


def attention(kind: str, share: float, us: float, **changes: Any) -> dict[str, Any]:
    row = {"shape": "vicuna-7b", "batch": 8, "tokens": 4096, "kind": kind, "bytes": 10**9}
    return {**row, "of_bandwidth": share, "us": us, **changes}


def step(system: str, speed: float, kv_bytes: int = 10) -> dict[str, Any]:
    row = {"shape": "vicuna-7b", "context": 4096, "system": system, "batch": 8}
    return {**row, "tokens_per_s": speed, "kv_bytes": kv_bytes, "weight_bytes": 5,
            "of_bandwidth": 0.8}  # fmt: skip


def judged(rows: list[dict[str, Any]]) -> dict[str, tuple[float | None, bool | None]]:
    return {v["target"]: (v["found"], v["held"]) for v in verdicts(rows)}


def test_nothing_measured_is_nothing_held() -> None:
    assert set(judged([{"what": "x", "left_out": "no time"}]).values()) == {(None, None)}
    # nor by half of a pair: the targets are judged after each row
    spans = judged([attention("spans", 0.9, 100.0)])
    assert spans["decode of differing spans, time of a uniform window's"] == (None, None)


def test_a_case_that_fails_leaves_the_others() -> None:
    def broken() -> dict[str, Any]:
        raise ValueError("no")

    failed = attempted("decode", broken)
    assert failed == {"what": "decode", "failed": 1, "said": "ValueError: no"}
    rows = [
        {**failed, "shape": "vicuna-7b", "batch": 8, "tokens": 4096, "kind": "spans"},
        {**failed, "shape": "vicuna-7b", "context": 4096, "system": "moac"},
        {**failed, "kind": "dense", "tokens": 16384},
        attention("uniform", 0.9, 100.0),
        step("hf", 9.0),
    ]
    found = judged(rows)
    assert found["decode attention, of copy bandwidth, calls of 64 MB and more"] == (0.9, True)
    assert found["tokens/s of the 7B shape, times hf"] == (None, None)
    assert found["correctness: layers, families, packages and compute-sanitizer"] == (3.0, False)


def test_fewer_rows_are_tried_where_memory_does_not_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = import_module("on_gpu.steps")
    setting = import_module("on_gpu.setting").rehearsal(torch.device("cpu"), 1e9)
    tried: list[int] = []

    def measure(setting: Any, *told: Any) -> dict[str, Any]:
        tried.append(min(15, setting.most_rows))  # 15 would fit, it seems
        if tried[-1] > 8:
            raise steps._TooManyRows(tried[-1])
        return {"batch": tried[-1]}

    monkeypatch.setattr(steps, "_measure", measure)
    setting = replace(setting, most_rows=64)
    found = steps._largest(setting, None, "tiny", 40, "moac", 1.0)
    assert tried == [15, 11, 8]
    assert found == {"batch": 8, "out_of_memory": [15, 11]}


def test_targets_are_judged_by_their_worst_case() -> None:
    rows = [
        attention("dense", 0.9, 100.0),
        attention("spans", 0.86, 104.0),
        attention("uniform", 0.95, 100.0),
        attention("dense", 0.72, 50.0, shape="llama3-8b", batch=1, tokens=32768),
        attention("dense", 0.1, 5.0, bytes=10**6, tokens=64),
        step("moac", 100.0),
        step("hf", 9.0),
        step("dense", 70.0),
        {**step("dense", 1.0, kv_bytes=4), "context": 8192},
        {"section": "layers", "failed": 0},
        {"section": "families", "failed": 1},
    ]
    found = judged(rows)
    assert found["decode attention, of copy bandwidth, calls of 64 MB and more"] == (0.86, True)
    assert found["decode attention llama3-8b b1 32k, of copy bandwidth"] == (0.72, True)
    assert found["decode of differing spans, time of a uniform window's"] == (1.04, True)
    assert found["tokens/s of the 7B shape, times hf"] == (100 / 9, True)
    assert found["tokens/s of the 7B shape, times dense"] == (100 / 70, False)
    assert found["tokens/s of the 7B shape, times hf-static"] == (None, None)
    assert found["correctness: layers, families, packages and compute-sanitizer"] == (1.0, False)


def test_prefill_is_judged_by_what_it_visits() -> None:
    rows = [
        {"kind": "dense", "tokens": 4096, "density": 1.0, "times_sdpa": 1.1, "flops_of_sdpa": 1.1},
        {"kind": "spans", "tokens": 4096, "density": 0.5, "times_sdpa": 1.0, "flops_of_sdpa": 0.8},
        {"kind": "spans", "tokens": 16384, "density": 0.5, "times_sdpa": 1.8,
         "flops_of_sdpa": 0.95},
    ]  # fmt: skip
    found = judged(rows)
    assert found["prefill, FLOP/s on visited tiles of SDPA's"] == (0.8, False)
    assert found["prefill at density 1, times as fast as SDPA"] == (1.1, True)
    target = "prefill of 16k and more, times density as fast as SDPA"
    assert found[target] == (pytest.approx(0.9), True)
