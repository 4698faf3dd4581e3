"""Options of benchmarks that are lists, and a benchmark as a process that ends as moac does."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from moac.checkpoint import open_checkpoint
from moac_runtime.errors import UsageError
from moac_runtime.host.process import run_process


def words(value: str) -> tuple[str, ...]:
    """`a,b` as names."""
    return tuple(value.split(","))


def numbers(value: str) -> tuple[int, ...]:
    """`1024,2048` as whole numbers."""
    return tuple(map(int, _listed(value, int, "1024,2048")))


def shares(value: str) -> tuple[float, ...]:
    """`0.5,0.25` as numbers."""
    return tuple(_listed(value, float, "0.5,0.25"))


def ended(work: Callable[[], int]) -> int:
    """The exit code of a benchmark's `work`; whatever fails ends in one sentence."""
    return run_process(
        work,
        interrupted="interrupted; run the same command again to go on",
        short_of_memory="end other programs, or measure shorter lengths",
    )


def check_lengths(model: str, lengths: Sequence[int]) -> None:
    """Raise UsageError for a length that the model has not."""
    context = open_checkpoint(model).spec.context
    if max(lengths) > context:
        raise UsageError(
            f"the length {max(lengths)} is beyond the model's context of {context} tokens; "
            "measure shorter ones"
        )


def _listed(value: str, kind: Callable[[str], float], example: str) -> list[float]:
    try:
        return [kind(part) for part in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{value!r} is not a list of numbers such as {example}"
        ) from None
