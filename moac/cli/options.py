"""Options that several commands share, each told once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from moac.effort import EFFORTS, STANDARD
from moac_runtime.errors import UsageError
from moac_runtime.host.sizes import parse_size

Command = TypeVar("Command", bound=Callable[..., Any])


def numbers(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """`1024,2048` as whole numbers, for tokens."""
    return _whole_numbers(value, "tokens such as 1024,2048")


def counts(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """`1,8` as whole numbers."""
    return _whole_numbers(value, "numbers such as 1,8")


def words(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    """`torch,onnx` as names."""
    if value is None:
        return None
    return tuple(part.strip() for part in value.split(","))


def size(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """`24GiB` as bytes."""
    if value is None:
        return None
    try:
        return parse_size(value)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None


def _whole_numbers(value: str | None, expected: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of {expected}") from None


def given(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Those parameters of the running command that someone gave; a request knows the others."""
    context, default = click.get_current_context(), click.core.ParameterSource.DEFAULT
    return {n: v for n, v in choices.items() if context.get_parameter_source(n) is not default}


def planning_options(command: Command) -> Command:
    """The options of a command that plans: their values are fields of `CompileRequest`."""
    for option in reversed(_PLANNING):
        command = option(command)
    return command


_PLANNING = (
    click.option(
        "--budget",
        default=0.5,
        show_default=True,
        metavar="SHARE",
        help="share of the dense model's KV memory that may stay, above 0 and at most 1",
    ),
    click.option(
        "--max-kv-bytes",
        callback=size,
        metavar="SIZE",
        help="in place of --budget: the most KV memory of a session, as 24GiB or 1e9",
    ),
    click.option(
        "--batch", type=int, metavar="N", help="sequences that --max-kv-bytes is for  [1]"
    ),
    click.option(
        "--length",
        type=int,
        metavar="N",
        help="tokens of each that --max-kv-bytes is for  [the capacity]",
    ),
    click.option(
        "--max-loss",
        type=float,
        metavar="NATS",
        help="in place of --budget: the least memory whose predicted loss, the upper end of its "
        "interval, stays so near the dense model's, per token",
    ),
    click.option(
        "--lengths",
        callback=numbers,
        metavar="N,N,...",
        help="prompt lengths to profile and plan for, in tokens  [from the context]",
    ),
    click.option(
        "--capacity", type=int, metavar="N", help="most tokens a session may hold  [the context]"
    ),
    click.option(
        "--dtype", metavar="NAME", help="float32, bfloat16 or float16  [the checkpoint's]"
    ),
    click.option(
        "--rules-per-layer",
        type=int,
        metavar="N",
        help="at most so many distinct span rules in a layer  [no limit]",
    ),
    click.option(
        "--kv-bits",
        type=click.Choice(("full", "8", "4", "auto")),
        help="width of keys and values: the package's dtype, so many bits for all KV heads, or by "
        "auto what each bears; budgets count bytes  [full]",
    ),
    click.option(
        "--calibration",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help='your own samples, JSONL of {"prompt"|"messages", "response"?}',
    ),
    click.option(
        "--effort",
        type=click.Choice(tuple(EFFORTS)),
        help="how much is measured: it decides lengths, samples, plans and drafts where they are "
        f"not given  [{STANDARD}]",
    ),
    click.option(
        "--samples",
        type=int,
        metavar="N",
        help="calibration samples of running text at the shortest length, of retrieval twice as "
        "many at every length  [by effort]",
    ),
    click.option(
        "--sink", default=64, show_default=True, metavar="N", help="first tokens every head keeps"
    ),
    click.option(
        "--block", default=64, show_default=True, metavar="N", help="spans are multiples of this"
    ),
    click.option(
        "--min-span",
        default=128,
        show_default=True,
        metavar="N",
        help="smallest span, sink included",
    ),
    click.option(
        "--plans",
        type=int,
        metavar="N",
        help="plans of the Pareto front to compare  [by effort]",
    ),
    click.option(
        "--seed", default=0, show_default=True, metavar="N", help="seed of the calibration samples"
    ),
    click.option("--revision", metavar="NAME", help="revision of a hub id  [main]"),
    click.option(
        "--work-dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="where each stage's result is kept  [$MOAC_CACHE or ~/.cache/moac]",
    ),
    click.option("--force", is_flag=True, help="replace the output once the new one is whole"),
    click.option(
        "--dry-run", is_flag=True, help="print the stages with time and memory, and stop"
    ),
    click.option("--json", "as_json", is_flag=True, help="the summary as JSON"),
)
