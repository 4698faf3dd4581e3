"""The replicas at hand: who is busy with how much, who is gone, and whom to ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from moac_runtime.serve.errors import ApiError
from moac_runtime.serve.replicas.replica import Message, Standing
from moac_runtime.serve.replicas.routing import ranked

_AGAIN_S = 0.5
_LOOK_S = 1.0
_LATE_S = 5.0
"""After which a replica that tells nothing counts as gone until it does."""


class Gone(Exception):
    """A replica's process has ended; another one takes its place in a while."""


class ReplicaHandle(Protocol):
    """A replica as it is asked from another process. Both raise Gone."""

    def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message]]:
        """As `replica.Replica.answer`."""

    async def tell(self) -> Standing:
        """As `replica.Replica.tell`."""


class Pool:
    """`replicas` by name; one that comes again comes under its old name."""

    def __init__(self, replicas: Mapping[str, ReplicaHandle]) -> None:
        self._replicas = replicas
        self._busy = dict.fromkeys(replicas, 0)
        self._away: dict[str, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._replicas)

    @property
    def here(self) -> Sequence[str]:
        """The names of those that run."""
        return [name for name in self._replicas if name not in self._away]

    async def answer(
        self, key: str, scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[list[Message]]:
        """What the best replica for `key` sends; the next best where it ends before it begins.

        Raises Gone where it ends later, and ApiError where no replica runs.
        """
        for name in ranked(key, {name: self._busy[name] for name in self.here}):
            begun = False
            self._busy[name] += 1
            try:
                async with aclosing(self._replicas[name].answer(scope, body)) as batches:
                    async for batch in batches:
                        begun = True
                        yield batch
                return
            except Gone:
                self._miss(name)
                if begun:
                    raise
            finally:
                self._busy[name] -= 1
        raise ApiError(503, "no replica runs now; try again in a while", retry_after=5)

    async def tell(self) -> dict[str, Standing]:
        """How each replica stands that runs, by name."""
        names = self.here
        found = await asyncio.gather(*(self._told(name) for name in names))
        return {name: told for name, told in zip(names, found, strict=True) if told is not None}

    async def watch(self) -> None:
        """Ask each replica now and then, for ever: one may end while nobody waits for it."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await self.tell()

    def close(self) -> None:
        """Wait for nobody any more."""
        for task in self._away.values():
            task.cancel()

    async def _told(self, name: str) -> Standing | None:
        try:
            return await asyncio.wait_for(self._replicas[name].tell(), _LATE_S)
        except (Gone, TimeoutError):
            self._miss(name)
            return None

    def _miss(self, name: str) -> None:
        if name not in self._away:
            self._away[name] = asyncio.ensure_future(self._until_back(name))

    async def _until_back(self, name: str) -> None:
        while True:
            try:
                await self._replicas[name].tell()
            except Gone:
                await asyncio.sleep(_AGAIN_S)
            else:
                del self._away[name]
                return
