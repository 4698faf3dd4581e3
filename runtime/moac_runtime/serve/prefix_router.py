"""Ray Serve's choice of a replica, by what a request begins with."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from moac_runtime.serve.routing import ranked


class PrefixRouter(RequestRouter):
    """Routes by the keywords `key` (`routing.key_of`) or `place`, a replica by its number."""

    def initialize_state(self, **kwargs: Any) -> None:
        """What is on its way to which replica, by the request's id."""
        self._underway: dict[str, ReplicaID] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The candidates one by one, best first."""
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        names = sorted(by_name)
        asked = {} if pending_request is None else pending_request.kwargs
        if "place" in asked and names:
            return [[by_name[names[asked["place"] % len(names)]]]]
        counts = Counter(replica.unique_id for replica in self._underway.values())
        order = ranked(asked.get("key", ""), {name: counts[name] for name in names})
        return [[by_name[name]] for name in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """A request that a replica took."""
        self._underway[pending_request.metadata.internal_request_id] = replica_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """One that has ended, well or not."""
        self._underway.pop(internal_request_id, None)
