"""Messages without an answer on their way to the replicas, in their order."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from server.engine.ray.interface import EngineReplicas, ReplicaLostError
from shared.protocol import Append, Credit, EndText, Message, encode

log = structlog.get_logger(__name__)


class Outboxes:
    """An outbox for each replica to which messages are on their way. `start` runs a coroutine as a task.

    `on_lost` gets the id of each request of which a replica may lack a message, and the replica.
    """

    def __init__(
        self,
        replicas: EngineReplicas,
        timeout_s: float,
        *,
        start: Callable[[Coroutine[Any, Any, None]], None],
        on_lost: Callable[[str, str], None],
    ) -> None:
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._start = start
        self._on_lost = on_lost
        self._by_replica: dict[str, _Outbox] = {}

    def post(self, replica: str, message: Message) -> None:
        """Send a message to a replica, after those that were sent before. Never blocks."""
        outbox = self._by_replica.get(replica)
        if outbox is None:
            outbox = self._by_replica[replica] = _Outbox(replica, self._replicas, self._timeout_s)
            self._start(self._empty(outbox))
        outbox.messages.append(message)

    async def flush(self) -> None:
        """Wait until all messages are sent, or lost."""
        await asyncio.gather(*(outbox.sent() for outbox in self._by_replica.values()))

    async def _empty(self, outbox: "_Outbox") -> None:
        try:
            lost = await outbox.send()
        finally:
            self._by_replica.pop(outbox.replica, None)
        for request_id in {message.id for message in lost if isinstance(message, Append | EndText | Credit)}:
            self._on_lost(request_id, outbox.replica)


class _Outbox:
    """Messages for one replica: one call is under way at a time, so that they arrive in their order."""

    def __init__(self, replica: str, replicas: EngineReplicas, timeout_s: float) -> None:
        self.replica = replica
        self.messages: list[Message] = []
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._empty = asyncio.Event()

    async def send(self) -> list[Message]:
        """Send all messages. Returns those that the replica may not have taken: it is lost, or has stood still."""
        messages: list[Message] = []
        try:
            while self.messages:
                messages, self.messages = self.messages, []
                async with asyncio.timeout(self._timeout_s):
                    await self._replicas.post(self.replica, [encode(message)[0] for message in messages])
        except (ReplicaLostError, TimeoutError) as error:
            lost = [*messages, *self.messages]
            log.info("messages_lost", replica=self.replica, messages=len(lost), reason=str(error))
            return lost
        except Exception:
            lost = [*messages, *self.messages]
            log.exception("messages_lost", replica=self.replica, messages=len(lost))
            return lost
        finally:
            self._empty.set()
        return []

    async def sent(self) -> None:
        """Wait until all messages are sent, or lost."""
        await self._empty.wait()
