"""The errors a user can meet: each is one sentence that says what is wrong and what to do."""

from __future__ import annotations

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127)}


class MoacError(Exception):
    """The work could not be done (exit code 1). The message is the sentence the user reads."""

    exit_code = 1

    def __str__(self) -> str:
        """The sentence on one line: names from files may hold what moves a terminal's cursor."""
        return super().__str__().translate(_CONTROL)


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
