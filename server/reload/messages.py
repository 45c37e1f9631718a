"""The messages of a reload between the main process and its web workers, and the state that they carry."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from server.http.errors import ApiError
from server.http.keys import Keyring
from shared.settings import Settings


class WebState(msgspec.Struct, frozen=True, kw_only=True):
    """The settings and keys in force, the same in all web workers.

    `worker_variables` are those that reloads have changed for the GPU worker since the start; "" is one that is unset.
    """

    settings: Settings
    keyring: Keyring
    worker_variables: dict[str, str] = {}


class ReloadOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a reload, by variables: changed, or kept until a restart. With `problems` nothing has changed."""

    changed: list[str] = []
    needs_restart: list[str] = []
    problems: list[str] = []


class StateForWorker(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the main process: `state` holds from now on. The answer is StateTaken with the same `reload`."""

    reload: int
    state: WebState


class ReloadAnswer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the main process: the outcome of the reload that answers the web worker's asks up to number `ask`."""

    ask: int
    outcome: ReloadOutcome


class Replaced(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the main process: another process serves in the place of this web worker."""


class ReloadAsked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a web worker: an admin wants a reload. The answer is a ReloadAnswer."""

    worker: int
    ask: int


class StateTaken(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a web worker: it has taken the state of that reload."""

    worker: int
    reload: int


ToWorker = StateForWorker | ReloadAnswer | Replaced
FromWorker = ReloadAsked | StateTaken

AskReload = Callable[[], Awaitable[ReloadOutcome]]
"""Asks the main process for a reload, and waits until every web worker has taken the new state."""


async def no_main_process() -> ReloadOutcome:
    """The AskReload of an application that no main process has started."""
    raise ApiError("not_found", "There is no reload here: start or deploy the application anew.")


def encode(message: ToWorker | FromWorker) -> bytes:
    """The message as bytes."""
    return msgspec.msgpack.encode(message, enc_hook=str)


def decode_to_worker(data: bytes) -> ToWorker:
    """A message of the main process."""
    return _to_worker.decode(data)


def decode_from_worker(data: bytes) -> FromWorker:
    """A message of a web worker."""
    return _from_worker.decode(data)


def _to_path(_kind: type, value: Any) -> Path:
    return Path(value)


_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker, dec_hook=_to_path)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
