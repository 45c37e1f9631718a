"""The two ZeroMQ sockets and all their options, and the address that they meet at.

The GPU worker binds one ROUTER. Each web worker connects one DEALER to it, over ipc:// inside a private directory.
The kernel closes the socket of a process that dies. There are no heartbeats of ZeroMQ: they would cut the connection
of a process that only pauses, and with it every stream. A pause is noticed by pings, which the synthesis loop answers.
"""

import fcntl
import os
import stat
from pathlib import Path
from typing import IO, Any, Final

import zmq

from shared.access import current_user

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
"""Far above the largest message, a recording of 60 s with 2.9 MB."""

_IPC_PREFIX: Final = "ipc://"
_MAX_IPC_PATH: Final = 107
"""The kernel's limit for the path of a Unix socket, in bytes."""


class AddressError(Exception):
    """The worker's address cannot be used; the message gives the reason and what to do."""


class AlreadyRunningError(AddressError):
    """Another GPU worker already serves this address."""


def ipc_path(url: str) -> Path:
    """The path in an ipc:// URL; AddressError if no socket can have it."""
    if not url.startswith(_IPC_PREFIX) or url.startswith(_IPC_PREFIX + "@"):
        raise AddressError(f"{url!r}: the address of the GPU worker must be ipc:///absolute/path")
    path = Path(url.removeprefix(_IPC_PREFIX))
    if not path.is_absolute():
        raise AddressError(f"{url!r}: the path after ipc:// must be absolute")
    if len(os.fsencode(path)) > _MAX_IPC_PATH:
        raise AddressError(f"{url!r}: the path is longer than the {_MAX_IPC_PATH} bytes that a Unix socket may have")
    return path


def claim(url: str) -> IO[bytes]:
    """Claim the address for this process: make its directory private (0700) and hold its lock.

    The lock is held until the returned file is closed. Without the lock, a second bind on an ipc path would succeed
    and silently steal the address. Raises AlreadyRunningError if another process holds the lock, AddressError if
    the directory does not belong to this user alone.
    """
    path = ipc_path(url)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.parent.stat()
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise AddressError(
                f"{path.parent}: this directory must belong to the worker's user, {current_user()}, with mode 0700"
            )
        lock = path.with_name(path.name + ".lock").open("ab")
    except OSError as error:
        raise AddressError(
            f"{url}: {path.parent} cannot be used by {current_user()}: {error.strerror or error}"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise AlreadyRunningError(f"{url}: another GPU worker is already serving there") from None
    return lock


def bind_router(context: zmq.Context[Any], url: str) -> zmq.Socket[bytes]:
    """The GPU worker's socket; AddressError if the address cannot be bound. Claim the address first.

    With ROUTER_MANDATORY, a send to a web worker that is gone is an error (EHOSTUNREACH) and not a silent loss.
    """
    router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    _set_common(router)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    try:
        router.bind(url)
    except zmq.ZMQError as error:
        router.close()  # a socket left open would keep its context from ever ending
        raise AddressError(f"{url}: no socket can be made there: {error.strerror}") from error
    return router


def connect_dealer(context: Any, url: str) -> Any:
    """A web worker's socket; of an asyncio context, it is an asyncio socket.

    With IMMEDIATE, a send without a connected worker fails at once (zmq.Again) and is not queued.
    """
    dealer = context.socket(zmq.DEALER)
    _set_common(dealer)
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    # Constant pauses: a try on a Unix socket costs nothing, and growing pauses connected a new worker 0.4 s late.
    dealer.setsockopt(zmq.RECONNECT_IVL, 50)
    dealer.setsockopt(zmq.HANDSHAKE_IVL, 2_000)
    dealer.connect(url)
    return dealer


def _set_common(socket: Any) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    # Credits, the bounded queue and single pings limit the messages in flight;
    # a high-water mark would drop messages or block.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
