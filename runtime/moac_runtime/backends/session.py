"""What every backend's session does: rows that come and go, and steps over any of them.

A row is one sequence. It has a capacity, which decides every head's span, and so its keys and
values take exactly the planned bytes from the moment it is admitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from moac_runtime.backends.arrays import Array
from moac_runtime.package.plan import Plan


class Feed(NamedTuple):
    """`tokens` that a step adds to `row`, at least one.

    `wanted`: ascending indices into `tokens` of those whose logits are asked for; None is the last
    token alone.
    """

    row: int
    tokens: Sequence[int]
    wanted: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A row as it stood, which sessions of the same model and plan restore as often as wanted.

    `bytes`: of the keys and values in it, which are those of the tokens held. The rest is opaque.
    """

    bytes: int
    length: int
    capacity: int
    origin: tuple[object, ...] = field(repr=False)
    content: Any = field(repr=False)


class Session(Protocol):
    """Rows of one model under one plan; for one thread at a time.

    Where `fixed_batch` is set, all rows are admitted, at one capacity, before the first step; then
    no row joins until the last has left. Rows of other sessions come and go at any step.

    A refusal is one sentence, a UsageError or MoacError, and nothing is fed or changed then.
    """

    @property
    def fixed_batch(self) -> bool:
        """Whether the rows of a batch must all be there before its first step."""

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows present, in the order they were admitted."""

    def admit(self, capacity: int) -> int:
        """A new row of at most `capacity` tokens, prompt and tokens to come.

        Its number is good until it is released, and is never given again.
        """

    def release(self, row: int) -> None:
        """Let a row go: its number and its memory. No other row is touched or copied.

        Where the batch is fixed, the memory may go later, with that of the others.
        """

    def step(self, feeds: Sequence[Feed]) -> Array:
        """Feed some rows; the wanted logits, float32 `[sum of wanted, V]`, in the order of feeds.

        The array is of the backend's own library; read it, or copy it to write. Where memory runs
        out on the way, rows may have been fed a part.
        """

    def snapshot(self, row: int) -> Snapshot:
        """The row as it stands; it goes on unchanged."""

    def restore(self, snapshot: Snapshot) -> int:
        """A new row that continues, token for token, as the one in the snapshot would."""

    def grow(self, row: int, capacity: int) -> None:
        """Move a row to a larger capacity: every head gets its span there and keeps what it holds.

        Tokens dropped before stay dropped. With `dynamic` RoPE, and `longrope`, new tokens are
        rotated by the larger capacity's frequencies, and keys already stored stay as they were
        rotated, as in transformers. In a fixed batch, whose rows share a capacity, all of them
        move.
        """

    def length(self, row: int) -> int:
        """Tokens fed to the row so far."""

    def capacity(self, row: int) -> int:
        """Tokens that the row may hold in all: N of the span rule."""

    def kv_bytes(self, row: int | None = None) -> int:
        """Bytes of keys and values: of one row, or allocated for all of them.

        All together are the sum over the rows present; in a fixed batch, memory that rows left
        behind counts until it is free.
        """


class Backend(Protocol):
    """A model's weights, read once, on one backend."""

    @property
    def dtype(self) -> str:
        """Of weights and caches, by name."""

    @property
    def kernels(self) -> str | None:
        """Which build of native kernels runs, None where there are none."""

    def session(self, plan: Plan | None = None) -> Session:
        """A session without rows, under the package's own plan or another one."""
