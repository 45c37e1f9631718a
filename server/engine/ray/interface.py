"""The replicas as a web process reaches them, and the errors of those that it cannot reach."""

from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

import msgspec

from server.engine.reports import ReplicaReport
from shared.protocol import KeyUse, Ping

ELSEWHERE: Final = frozenset({"queue_full", "worker_unavailable", "shutting_down"})
"""Codes of a refusal that another replica may not repeat."""

Frames = list[bytes]
"""One message of shared/protocol/: its header, and its payload if it has one."""


class ReplicaLostError(Exception):
    """A replica died, or cannot be reached; the message says what happened."""


class ReportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for a ReplicaReport. `ingress` names the asking process; it lives while it asks. `ping` has its figures.

    `fresh`: the snapshot must be one that the GPU worker makes now.
    """

    ingress: str
    fresh: bool = False
    boot_id: str = ""
    ping: Ping = Ping()
    used_elsewhere: dict[str, KeyUse] = {}
    """The use of clients with limits at the other replicas."""


class ReplicaStream(Protocol):
    """The answers to one Speak: batches of messages, of which the first begins with the replica's id."""

    def __aiter__(self) -> AsyncIterator[list[Frames]]:
        """The batches, as they arrive. Raises ReplicaLostError if the replica is lost."""

    def cancel(self) -> None:
        """End the request, wherever it is."""


class EngineReplicas(Protocol):
    """The replicas as one process reaches them. Every method may raise ReplicaLostError."""

    def ids(self) -> Sequence[str]:
        """The replicas that take new requests. Never raises."""

    def wake(self) -> None:
        """Have a replica started if there is none. Never raises, and returns at once."""

    def update(self, reports: dict[str, ReplicaReport]) -> None:
        """Take the latest reports, by which replicas are chosen."""

    def speak(
        self, request: bytes, reference: bytes | None, *, ingress: str, model: str, avoid: Sequence[str]
    ) -> ReplicaStream:
        """Send a Speak to a replica that is chosen by `model`, and is none of `avoid` if there is another."""

    async def call(self, replica: str, call: bytes, payload: bytes | None, *, model: str) -> Frames:
        """Send a Call; returns a Reply or a Failed. Without a name the replica is chosen by `model`."""

    async def post(self, replica: str, messages: list[bytes]) -> None:
        """Send messages that have no answer to the replica, also to one that takes no new requests."""

    async def report(self, replica: str, request: bytes) -> bytes:
        """Ask a replica for its report."""
