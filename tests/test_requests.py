"""Requests made in Python are refused in the same sentences as on the command line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from moac import CompileRequest
from moac.bench.request import BenchRequest
from moac.cli.bench import bench_command
from moac.cli.group import cli
from moac.evaluation import EvalRequest
from moac.goal import DEFAULT_BUDGET, Budget, Goal, MaxKvBytes, MaxLoss
from moac.pipeline.verify import verify
from moac_runtime.errors import UsageError


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"budget": "0.5"}, "budget is '0.5', expected a number"),
        ({"budget": True}, "budget is True, expected a number"),
        ({"budget": float("nan")}, "the budget is nan, expected above 0 and at most 1"),
        ({"budget": float("inf")}, "the budget is inf, expected above 0 and at most 1"),
        ({"max_loss": "1"}, "max loss is '1', expected a number"),
        ({"max_loss": float("nan")}, "the most loss is nan, expected a number of nats"),
        ({"max_kv_bytes": "24GiB"}, "max kv bytes is '24GiB', expected a whole number"),
        ({"max_kv_bytes": 1.5}, "max kv bytes is 1.5, expected a whole number"),
        ({"batch": 2}, "--batch says what --max-kv-bytes is for; give --max-kv-bytes with it"),
        ({"length": 512}, "--length says what --max-kv-bytes is for"),
        ({"lengths": 512}, "lengths is 512, expected a tuple of whole numbers"),
        ({"lengths": "512"}, "lengths is '512', expected a tuple of whole numbers"),
        ({"lengths": (512.0,)}, "lengths is 512.0, expected a tuple of whole numbers"),
        ({"lengths": (True,)}, "lengths is True, expected a tuple of whole numbers"),
        ({"lengths": ()}, "lengths must be positive numbers of tokens"),
        ({"capacity": "4k"}, "capacity is '4k', expected a whole number"),
        ({"targets": "torch"}, "targets is 'torch', expected a tuple of names"),
        ({"targets": ("torch", 1)}, "targets is 1, expected a tuple of names"),
        ({"dtype": 16}, "dtype is 16, expected text"),
        ({"sink": None}, "sink is None, expected a whole number"),
        ({"samples": 2.0}, "samples is 2.0, expected a whole number"),
        ({"calibration": 7}, "calibration is 7, expected a path"),
        ({"calibration": "nowhere.jsonl"}, "cannot read the calibration file nowhere.jsonl"),
        ({"seed": -1}, "seed is -1, expected 0 to 2^63 - 1"),
        ({"seed": 2**63}, "seed is 9223372036854775808, expected 0 to 2^63 - 1"),
        ({"max_shard_size": 0}, "max shard size is 0, expected at least 1"),
        ({"onnx_dtype": "float16"}, "--onnx-dtype is for the onnx target; add onnx to --target"),
    ],
)
def test_a_compile_that_cannot_be_meant(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        CompileRequest(**asked)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "goal"),
    [
        ({}, Budget(0.5)),
        ({"budget": 1}, Budget(1)),
        ({"max_loss": 0.1}, MaxLoss(0.1)),
        ({"max_kv_bytes": 7}, MaxKvBytes(7, batch=None, length=None)),
        ({"max_kv_bytes": 7, "batch": 2, "length": 3}, MaxKvBytes(7, batch=2, length=3)),
    ],
)
def test_a_compile_has_one_goal(asked: dict[str, Any], goal: Goal) -> None:
    assert CompileRequest(**asked).goal == goal


@pytest.mark.parametrize("asked", [{"batch": 2}, {"length": 512}])
@pytest.mark.parametrize("other", [{"budget": 0.5}, {"max_loss": 0.1}])
def test_sequences_without_their_bytes(asked: dict[str, Any], other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="give --max-kv-bytes with it"):
        CompileRequest(**asked, **other)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"samples": "50"}, "samples is '50', expected a whole number"),
        ({"tasks": "passkey"}, "tasks is 'passkey', expected a tuple of names"),
        ({"lengths": (0,)}, "lengths must be positive numbers of tokens"),
        ({"against": None}, "against is None, expected a tuple of names"),
        ({"seed": -1}, "seed is -1, expected 0 to 2^63 - 1"),
        ({"batch": True}, "batch is True, expected a whole number"),
    ],
)
def test_an_evaluation_that_cannot_be_meant(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        EvalRequest(**asked)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"density": "0.5"}, "density is '0.5', expected a number"),
        ({"density": float("nan")}, "--density must be above 0 and at most 1, got nan"),
        ({"batches": 1}, "batches is 1, expected a tuple of whole numbers"),
        ({"sequential": "no"}, "sequential is 'no', expected True or False"),
        ({"seed": -1}, "seed is -1, expected 0 to 2^63 - 1"),
    ],
)
def test_a_benchmark_that_cannot_be_meant(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        BenchRequest(shape="smollm2-135m", **asked)
    assert words in str(caught.value)


def test_what_python_has_in_place_of_a_type_is_taken(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "a"}\n')
    asked: Any = {
        "lengths": [np.int64(512), 768],
        "calibration": str(own),
        "budget": np.float32(1),
    }
    made = CompileRequest(**asked)
    assert (made.lengths, made.calibration, made.budget) == ((512, 768), own, 1.0)
    assert made.to_json()["lengths"] == [512, 768]


def test_lengths_of_verify_are_checked_in_python(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --source"):
        next(verify(tmp_path, lengths=(64,)))


@pytest.mark.parametrize(
    ("command", "request_of"),
    [("plan", CompileRequest), ("compile", CompileRequest), ("eval", EvalRequest)],
)
def test_the_command_line_tells_the_defaults_of_the_request(command: str, request_of: Any) -> None:
    _check_defaults(cli.commands[command], request_of)


def test_the_benchmark_tells_the_defaults_of_its_request() -> None:
    _check_defaults(bench_command, BenchRequest)


def _check_defaults(command: click.Command, request_of: Any) -> None:
    defaults = {field.name: field.default for field in fields(request_of)}
    defaults["budget"] = DEFAULT_BUDGET
    context = click.Context(command)
    shown = 0
    for option in command.params:
        if option.name in defaults and isinstance(option, click.Option) and option.show_default:
            value = option.process_value(context, option.get_default(context))
            assert value == defaults[option.name], option.name
            shown += 1
    assert shown > 3
