"""The errors a user can meet: each is one sentence that says what is wrong and what to do."""

from __future__ import annotations

# What moves a terminal's cursor, ends a line or turns the direction of writing.
_MOVES = (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F))
_MOVES += tuple(range(0x2066, 0x206A))
_SPELT = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _MOVES}
_MOST, _TAIL = 2000, 500


def plain_line(text: str) -> str:
    """`text` from others on one line of a terminal: characters that move its cursor are spelt."""
    return text.translate(_SPELT)


class MoacError(Exception):
    """The work could not be done (exit code 1). The message is the sentence the user reads."""

    exit_code = 1

    def __str__(self) -> str:
        """The sentence on one line, what it quotes at length cut: names and values from files may
        hold anything."""
        text = plain_line(super().__str__())
        if len(text) <= _MOST:
            return text
        return f"{text[: _MOST - _TAIL]} [...] {text[-_TAIL:]}"


class UsageError(MoacError):
    """The request itself is wrong: an option, a value or a combination (exit code 2)."""

    exit_code = 2


class CheckFailed(MoacError):
    """A check ran and did not hold (exit code 3)."""

    exit_code = 3


class ArtifactError(MoacError):
    """A package is missing, damaged, altered or made for a newer reader (exit code 1)."""


class CheckpointError(MoacError):
    """A checkpoint is missing, damaged, contradictory or of a kind not served (exit code 1)."""


class BudgetError(MoacError):
    """No plan meets the budget (exit code 1)."""
