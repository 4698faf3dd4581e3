"""What benchmarks are asked for, and a benchmark as a process that ends as moac does."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from told import default_out

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


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """A benchmark's own parser, with what all of them take; `parsed` reads by it."""
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("model", nargs="?", help="the checkpoint")
    add("--work-dir", type=Path, default=Path(".cache/efforts"), metavar="DIR",
        help="where everything is kept (.cache/efforts)")  # fmt: skip
    add("--planning", type=shlex.split, default=[], metavar="WORDS", help="more for moac plan")
    add("--packaging", type=shlex.split, default=[], metavar="WORDS", help="for moac compile")
    add("--out", type=Path, default=default_out(name), metavar="FILE",
        help=f"JSON, its page beside it (benchmarks/results/{name}-<date>.json)")  # fmt: skip
    add("--table-only", action="store_true", help="write the page again from --out")
    return made


def parsed(made: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """What `arguments` ask for; a checkpoint, unless only the page is written again."""
    options = made.parse_args(arguments)
    if options.model is None and not options.table_only:
        made.error("name the checkpoint, or give --table-only")
    return options


def ended(work: Callable[[list[str]], int], argv: list[str] | None) -> int:
    """The exit code of a benchmark's `work`; whatever fails ends in one sentence.

    `argv`: None is the process's own arguments.
    """
    arguments = sys.argv[1:] if argv is None else argv
    return run_process(
        lambda: work(arguments),
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
