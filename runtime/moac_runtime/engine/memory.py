"""What rows take of the memory for keys and values: known to the byte before one is admitted."""

from __future__ import annotations

from moac_runtime.backends.session import Session
from moac_runtime.errors import UsageError

KV_BYTES = 2 * 2**30
"""Of all rows at once, where nobody says more or less."""
KEPT_BYTES = 2**30
"""Of kept caches, beside the rows."""


class KvMemory:
    """The bytes of a session's rows under `limit`, None for as many as there are.

    A session of fixed batches tells no bytes before its batch runs and takes no limit.
    """

    def __init__(self, session: Session, limit: int | None) -> None:
        if limit is not None and session.fixed_batch:
            raise UsageError(
                "this backend runs fixed batches, which no limit of KV bytes cuts; leave it out, "
                "or run with the backend cpu or torch"
            )
        self._session = session
        self._planned: dict[int, int] = {}
        self.limit = limit

    @property
    def used(self) -> int:
        """Bytes of the rows that are there."""
        return self._session.kv_bytes()

    def planned(self, capacity: int) -> int:
        """Bytes of a row of `capacity` tokens; asked of the session once."""
        if capacity not in self._planned:
            row = self._session.admit(capacity)
            try:
                self._planned[capacity] = self._session.kv_bytes(row)
            finally:
                self._session.release(row)
        return self._planned[capacity]

    def has_room(self, capacity: int, *, instead_of: int = 0) -> bool:
        """Whether a row of `capacity` fits, `instead_of` so many bytes that it gives back."""
        if self.limit is None:
            return True
        return self.used - instead_of + self.planned(capacity) <= self.limit

    def check(self, capacity: int) -> None:
        """Raises UsageError where a row of `capacity` would not fit even alone."""
        if self.limit is not None and self.planned(capacity) > self.limit:
            raise UsageError(
                f"a row of {capacity} tokens takes {self.planned(capacity)} bytes of keys and "
                f"values, and the limit is {self.limit}; raise --max-kv-bytes (max_kv_bytes=), or "
                "ask for a smaller capacity"
            )
