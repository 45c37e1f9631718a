"""The request router of the engine deployment: Serve calls it in each process that sends requests to the replicas.

`RouterBase` chooses the replica of a new request, and knows how to reach the replica that already has one, also while
that replica drains and takes no new requests. The choice itself is placement.py's.
Serve copies the code of a router's class into each process, so router.py has a class without any.
"""

import asyncio
import dataclasses
import uuid
from collections import OrderedDict
from typing import Any, ClassVar, Final

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.cluster.placement import Placement
from server.engine.ray import ReplicaLostError
from shared.catalog import load_catalog
from shared.settings import ReplicaBounds

_DRAINING_KEPT: Final = 256
"""Replicas that are remembered after they were taken out of service."""


_SPEAK: Final = "speak"
"""The method of EngineReplica whose requests hold slots."""


class RouterBase(RequestRouter):
    """The one router of its process; `current` is that object."""

    current: ClassVar["RouterBase | None"] = None

    def initialize_state(self, *, model_replicas: dict[str, list[int]], **_options: Any) -> None:
        """Serve calls it once the router is there. `model_replicas`: bounds by model."""
        self.placement = Placement(
            {model: ReplicaBounds(*bounds) for model, bounds in model_replicas.items()},
            {spec.id: spec.estimated_bytes for spec in load_catalog()},
        )
        """RayEngineClient brings it the reports of the replicas."""
        self._reachable: OrderedDict[str, RunningReplica] = OrderedDict()
        self._metadata: Any = None
        RouterBase.current = self

    def replica_names(self) -> list[str]:
        """The replicas that take new requests."""
        return [replica.unique_id for replica in self.curr_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve has started or stopped replicas."""
        super().update_replicas(replicas)
        for replica in replicas:
            name = replica.replica_id.unique_id
            self._reachable[name] = replica
            self._reachable.move_to_end(name)
        while len(self._reachable) > max(_DRAINING_KEPT, 2 * len(replicas)):
            self._reachable.popitem(last=False)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica for a request, as a list of ranks with one replica each."""
        if pending_request is None:
            return [candidate_replicas]
        self._metadata = self._metadata or pending_request.metadata
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        metadata = pending_request.metadata
        avoid = pending_request.kwargs.get("avoid", ())
        names = self.placement.choose(list(by_name), metadata.multiplexed_model_id, avoid)
        if metadata.call_method == _SPEAK:
            # The next choice, which may come before the replica answers, knows of this one.
            self.placement.sent(metadata.internal_request_id, names[0], metadata.multiplexed_model_id, taken=False)
        return [[by_name[name]] for name in names]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """A replica has taken the request."""
        super().on_request_routed(pending_request, replica_id, result)
        metadata = pending_request.metadata
        if metadata.call_method == _SPEAK:
            model = metadata.multiplexed_model_id
            self.placement.sent(metadata.internal_request_id, replica_id.unique_id, model, taken=True)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """The request has ended at the replica, in whatever way."""
        super().on_request_completed(replica_id, internal_request_id)
        self.placement.ended(internal_request_id)

    def can_address(self) -> bool:
        """True if `ask` works: a first request has been routed, and Serve's metadata are known."""
        return self._metadata is not None

    async def ask(self, name: str, method: str, *arguments: Any) -> Any:
        """Call a method of one replica and wait for its result; ReplicaLostError if it is not known."""
        replica = self._reachable.get(name)
        if replica is None or self._metadata is None:
            raise ReplicaLostError("the replica is gone")
        number = uuid.uuid4().hex
        metadata = dataclasses.replace(
            self._metadata,
            request_id=number,
            internal_request_id=number,
            call_method=method,
            multiplexed_model_id="",
            is_streaming=False,
        )
        request = PendingRequest(args=list(arguments), kwargs={}, metadata=metadata)
        result = replica.try_send_request(request, with_rejection=False)
        try:
            return await result.get_async()
        except asyncio.CancelledError:
            result.cancel()
            raise
