"""Evaluation through the packaged runtime: synthetic tasks, plain text, the user's own."""

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
