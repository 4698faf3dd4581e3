"""What may be fed to a session: the checks that every torch session makes before it feeds any."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from moac_runtime.errors import MoacError, UsageError


def check_sizes(**sizes: int) -> None:
    """Raises UsageError for a size, named by its keyword, below one."""
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1; give a positive {name}")


def check_tokens(
    tokens: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    *,
    batch: int,
    vocab_size: int,
) -> None:
    """A list of tokens for each row, and ascending indices into it. Raises UsageError."""
    if len(tokens) != batch or len(wanted) != batch:
        raise UsageError(
            f"got tokens for {len(tokens)} rows and a choice of logits for {len(wanted)}, "
            f"expected {batch} of each; give every row of the batch a list, empty where "
            "it adds nothing"
        )
    for row, (fed, chosen) in enumerate(zip(tokens, wanted, strict=True)):
        if fed:
            check_vocabulary(min(fed), max(fed), vocab_size)
        rising = all(a < b for a, b in pairwise(chosen))
        if chosen and not (rising and chosen[0] >= 0 and chosen[-1] < len(fed)):
            raise UsageError(
                f"row {row} is fed {len(fed)} tokens and asked for logits at {list(chosen)}; "
                f"give ascending indices from 0 to {len(fed) - 1}"
            )


def check_vocabulary(least: int, most: int, size: int) -> None:
    """Raises UsageError where the least or the most of some tokens is none of `size`."""
    if least < 0 or most >= size:
        raise UsageError(
            f"got token {least if least < 0 else most}, expected tokens from 0 to {size - 1}; "
            "encode the text with the package's own tokenizer"
        )


def check_step(shape: Sequence[int], batch: int) -> None:
    """Raises UsageError where tokens of this shape are not one for each row."""
    if tuple(shape) != (batch,):
        raise UsageError(
            f"decode got tokens of shape {list(shape)}, expected [{batch}]; "
            "give each row of the batch one token"
        )


def check_room(lengths: Sequence[int], counts: Sequence[int], capacity: int) -> None:
    """Raises MoacError where a row of `lengths` tokens cannot take `counts` more."""
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        if length + count > capacity:
            raise MoacError(
                f"row {row} holds {length} of {capacity} tokens and cannot take "
                f"{count} more; open the session with a larger capacity or grow it"
            )


def check_growth(capacity: int, wanted: int) -> None:
    """Raises UsageError for a capacity that is not larger."""
    if wanted <= capacity:
        raise UsageError(
            f"cannot grow a session of {capacity} tokens to {wanted}; give a larger capacity"
        )


def check_kept(rows: Sequence[int], batch: int) -> None:
    """Raises UsageError for no rows and for a row that the batch does not have."""
    if not rows or min(rows) < 0 or max(rows) >= batch:
        raise UsageError(
            f"cannot keep rows {list(rows)} of a batch of {batch}; "
            f"name one or more rows from 0 to {batch - 1}"
        )
