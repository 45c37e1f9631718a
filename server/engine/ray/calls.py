"""Actions that are not speech, over the replicas: some go to all of them, the others to one."""

import asyncio
from typing import Final

from server.engine.client import error_of
from server.engine.outage import unavailable_error
from server.engine.ray.interface import ELSEWHERE, EngineReplicas, ReplicaLostError
from server.engine.ray.key_use import merge_usage
from server.http.errors import ApiError
from shared.protocol import (
    Action,
    Cleanup,
    EmptyCache,
    Failed,
    FindSpeech,
    FindUsage,
    PinModel,
    ProtocolError,
    Reply,
    UnloadModel,
    decode_from_worker,
)

FOR_ALL: Final = (UnloadModel, PinModel, Cleanup, EmptyCache, FindSpeech, FindUsage)
"""Actions that concern every GPU worker, or the one of which only it knows."""


class ReplicaCalls:
    """Calls to the replicas. `message` and `payload` are those of an encoded Call; each method may raise ApiError."""

    def __init__(self, replicas: EngineReplicas) -> None:
        self._replicas = replicas

    async def call(self, action: Action, message: bytes, payload: bytes | None) -> Reply:
        """Actions on one model's place, on caches and on outcomes go to all replicas, the others to one of them."""
        if isinstance(action, FOR_ALL):
            return await self._call_all(action, message, payload)
        return await self._call_one(message, payload, model=getattr(action, "model", ""))

    async def call_replica(self, replica: str, message: bytes, payload: bytes | None, *, model: str = "") -> Reply:
        """The reply of one replica; without a name, of the one that is chosen by `model`."""
        try:
            answer, _ = decode_from_worker(await self._replicas.call(replica, message, payload, model=model))
        except ReplicaLostError:
            raise unavailable_error("The GPU worker went away.") from None
        except ProtocolError as error:
            raise ApiError("internal_error", f"The GPU worker's answer was {error}.") from None
        if isinstance(answer, Failed):
            raise error_of(answer)
        if not isinstance(answer, Reply):
            raise ApiError("internal_error", "The GPU worker sent no reply.")
        return answer

    async def _call_one(self, message: bytes, payload: bytes | None, *, model: str) -> Reply:
        error = unavailable_error("No GPU worker is there.")
        for name in ["", *self._replicas.ids()]:  # first the one that is chosen, then whichever is there
            try:
                return await self.call_replica(name, message, payload, model=model)
            except ApiError as failure:
                if failure.code not in ELSEWHERE:
                    raise
                error = failure
        raise error

    async def _call_all(self, action: Action, message: bytes, payload: bytes | None) -> Reply:
        calls = [self.call_replica(name, message, payload) for name in self._replicas.ids()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        replies = [answer for answer in answers if isinstance(answer, Reply)]
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if not replies or (errors and isinstance(action, FindUsage)):  # a sum without one of its parts would be wrong
            raise errors[0] if errors else unavailable_error("No GPU worker is there.")
        return merge_usage(replies) if isinstance(action, FindUsage) else replies[0]
