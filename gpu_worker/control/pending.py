"""The calls that are not answered yet, and what each one waits for."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec

from gpu_worker.engines.base import JobError
from gpu_worker.requests import failed_message
from gpu_worker.voices import VoiceWrite
from shared.protocol import Call, FindUsage, Message

Answer = Callable[[Message], None]


class Caller(msgspec.Struct, frozen=True):
    """The web worker that made a call; `answer` sends its only answer."""

    peer: bytes
    call_id: str
    answer: Answer

    def fail(self, error: JobError) -> None:
        """Answer that the call has failed."""
        self.answer(failed_message(self.call_id, error))


class _Pending(msgspec.Struct, frozen=True):
    caller: Caller


class PendingLoad(_Pending, frozen=True):
    """Done when `model` is resident."""

    model: str


class PendingUnload(_Pending, frozen=True):
    """Done when `model` is absent."""

    model: str


class PendingCleanup(_Pending, frozen=True):
    """Done when the cleanup pass has ended."""


class PendingWrite(_Pending, frozen=True):
    """Done when the report of `write` is there."""

    write: VoiceWrite


class PendingUsage(_Pending, frozen=True):
    """Done when the rows of `find` are there."""

    find: FindUsage


class PendingScan(_Pending, frozen=True):
    """A call that failed by an outdated list; carried out again after scan `number` of the voices' folder."""

    number: int
    call: Call
    payload: bytes | None


PendingCall = PendingLoad | PendingUnload | PendingCleanup | PendingWrite | PendingUsage | PendingScan

P = TypeVar("P", bound=PendingCall)


class PendingCalls:
    """The pending calls, in the order in which they came."""

    def __init__(self) -> None:
        self._calls: list[PendingCall] = []

    def __iter__(self) -> Iterator[PendingCall]:
        """The calls at this moment; the caller may remove some meanwhile."""
        return iter(list(self._calls))

    def add(self, pending: PendingCall) -> None:
        """A call waits for its answer."""
        self._calls.append(pending)

    def remove(self, pending: PendingCall) -> None:
        """The call is being answered."""
        self._calls.remove(pending)

    def take(self, kind: type[P], is_meant: Callable[[P], bool]) -> Iterator[P]:
        """Remove the calls of that kind that are meant, one by one."""
        for pending in self:
            if isinstance(pending, kind) and is_meant(pending):
                self.remove(pending)
                yield pending

    def forget(self, peer: bytes, call_id: str | None = None) -> None:
        """Remove that call, or all calls of `peer` if there is no `call_id`."""
        self._calls = [
            pending
            for pending in self._calls
            if pending.caller.peer != peer or (call_id is not None and pending.caller.call_id != call_id)
        ]

    def fail_all(self, error: JobError) -> None:
        """Fail every call: the process ends."""
        for pending in self._calls:
            failed = failed_message(pending.caller.call_id, error)
            if isinstance(pending, PendingWrite):  # the disk may still take it
                write = pending.write
                message = f"{error.message}; the {write.noun} may be {write.participle} all the same"
                failed = msgspec.structs.replace(failed, message=message)
            pending.caller.answer(failed)
        self._calls.clear()
