"""What an engine did so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Totals:
    """Counts since the engine was made.

    `read`: prompt tokens fed; `reused`: prompt tokens that kept caches held; `chosen`: answer
    tokens; `written`: those of them that were fed. A step's seconds are shared out between reading
    and writing by their tokens. `held`: most bytes of rows at once; `dense`: what the model
    holds of as many tokens by itself; `rows`: most at once.
    """

    steps: int = 0
    read: int = 0
    reused: int = 0
    written: int = 0
    chosen: int = 0
    read_s: float = 0.0
    write_s: float = 0.0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    held: int = 0
    dense: int = 0
    rows: int = 0

    def count_step(self, *, read: int, written: int, seconds: float) -> None:
        """A step that fed so many tokens of prompts and of answers."""
        self.steps += 1
        self.read += read
        self.written += written
        share = read / (read + written)
        self.read_s += share * seconds
        self.write_s += (1 - share) * seconds

    def note_peak(self, held: int, dense: int, rows: int) -> None:
        """The rows as they stand, and their bytes."""
        self.rows = max(self.rows, rows)
        if held > self.held:
            self.held, self.dense = held, dense
