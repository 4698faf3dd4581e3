"""Evaluation through the packaged runtime: synthetic tasks, plain text, the user's own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moac.evaluation.request import TASKS, EvalRequest
    from moac.evaluation.results import Difference, Evaluation, Result, evaluation_text
    from moac.evaluation.suite import evaluate

__all__ = [
    "TASKS",
    "Difference",
    "EvalRequest",
    "Evaluation",
    "Result",
    "evaluate",
    "evaluation_text",
]

_HOMES = {
    "TASKS": "request",
    "Difference": "results",
    "EvalRequest": "request",
    "Evaluation": "results",
    "Result": "results",
    "evaluate": "suite",
    "evaluation_text": "results",
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `python -m moac.evaluation.lm_eval` tells first what is not installed.
    if name in _HOMES:
        return getattr(import_module(f"moac.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
