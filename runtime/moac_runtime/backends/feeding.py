"""What may be fed to a session, and how it is cut into steps: before anything is fed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from moac_runtime.backends.arrays import Array
from moac_runtime.backends.session import Feed
from moac_runtime.errors import MoacError, UsageError

if TYPE_CHECKING:
    from moac_runtime.backends.rows import Row


class Piece(NamedTuple):
    """The tokens `first` to `stop - 1` of a feed, which share a step with other pieces.

    `feed`: which one; `wanted`: those of the piece's tokens whose logits are asked for, counted
    from its first; `place`: where these begin among all logits asked for.
    """

    feed: int
    first: int
    stop: int
    wanted: Sequence[int]
    place: int

    @property
    def size(self) -> int:
        """Tokens of the piece."""
        return self.stop - self.first


def wanted_of(feed: Feed) -> Sequence[int]:
    """The indices of the tokens whose logits a feed asks for."""
    return (len(feed.tokens) - 1,) if feed.wanted is None else feed.wanted


def num_wanted(feeds: Sequence[Feed]) -> int:
    """How many tokens' logits are asked for in all."""
    return sum(len(wanted_of(feed)) for feed in feeds)


def by_feed(logits: Array, feeds: Sequence[Feed]) -> list[Array]:
    """The logits of a step `[sum of wanted, V]` as those of each of its feeds `[wanted, V]`."""
    ends = accumulate((len(wanted_of(feed)) for feed in feeds), initial=0)
    return [logits[first:stop] for first, stop in pairwise(ends)]


def cut(feeds: Sequence[Feed], most: int) -> Iterator[list[Piece]]:
    """Steps of at most `most` tokens, or of one for each feed where these are more.

    Feeds come one after another until a step is full.
    """
    most, fed = max(most, len(feeds)), [0] * len(feeds)
    while True:
        pieces, room, place = [], most, 0
        for index, feed in enumerate(feeds):
            wanted, first = wanted_of(feed), fed[index]
            stop = min(first + room, len(feed.tokens))
            if first < stop:
                before, after = bisect_left(wanted, first), bisect_left(wanted, stop)
                asked = [place_ - first for place_ in wanted[before:after]]
                pieces.append(Piece(index, first, stop, asked, place + before))
                room, fed[index] = room - (stop - first), stop
            place += len(wanted)
        if not pieces:
            return
        yield pieces


def check_sizes(**sizes: int) -> None:
    """Raises UsageError for a size, named by its keyword, below one."""
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1; give a positive {name}")


def check_feeds(feeds: Sequence[Feed], rows: Mapping[int, Row], *, vocab_size: int) -> None:
    """Rows that are there, each once, tokens that are some and fit, and indices into them.

    Raises UsageError, and MoacError where a row is too full.
    """
    if not feeds:
        raise UsageError("the step feeds no row; give at least one row and its tokens")
    seen: set[int] = set()
    for feed in feeds:
        row = rows.get(feed.row)
        if row is None:
            raise no_row(feed.row)
        if feed.row in seen:
            raise UsageError(f"row {feed.row} is fed twice in a step; join its tokens in one feed")
        seen.add(feed.row)
        _check_feed(feed, row, vocab_size)


def no_row(row: int) -> UsageError:
    """What is said of a row that a session does not have."""
    return UsageError(f"the session has no row {row}; name one that was admitted and not released")


def _check_feed(feed: Feed, row: Row, vocab_size: int) -> None:
    count, wanted = len(feed.tokens), feed.wanted
    if not count:
        raise UsageError(f"row {feed.row} is fed no tokens; leave it out of the step")
    least, most = min(feed.tokens), max(feed.tokens)
    if least < 0 or most >= vocab_size:
        raise UsageError(
            f"row {feed.row} is fed token {least if least < 0 else most}, expected tokens from 0 "
            f"to {vocab_size - 1}; encode the text with the package's own tokenizer"
        )
    if wanted and not (
        wanted[0] >= 0 and wanted[-1] < count and all(a < b for a, b in pairwise(wanted))
    ):
        raise UsageError(
            f"row {feed.row} is fed {count} tokens and asked for logits at {list(wanted)}; "
            f"give ascending indices from 0 to {count - 1}"
        )
    if row.length + count > row.capacity:
        raise MoacError(
            f"row {feed.row} holds {row.length} of {row.capacity} tokens and cannot take "
            f"{count} more; admit it with a larger capacity or grow it"
        )


def check_growth(capacity: int, wanted: int) -> None:
    """Raises UsageError for a capacity that is not larger."""
    if wanted <= capacity:
        raise UsageError(
            f"cannot grow a row of {capacity} tokens to {wanted}; give a larger capacity"
        )
