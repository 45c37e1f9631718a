"""The addresses that the service listens on, and the hold on its port for as long as the service lives.

Granian's web workers share their port (SO_REUSEPORT), also with the web workers of another service.
`hold_port` takes the port for one service alone. It accepts no connection.
"""

import errno
import pwd
import socket
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from shared.access import current_user
from shared.settings import variable_of

_NAMES: Final = {"*": ["::", "0.0.0.0"], "localhost": ["127.0.0.1", "::1"]}  # noqa: S104 -- the user asked for all
"""Names that mean the same on every machine."""

_OWNER_WAIT_S: Final = 3.0
"""A service that has just started holds its port for so long before it listens, and can be found."""

_LISTEN: Final = "0A"
"""The state in /proc/net/tcp."""


class HostError(Exception):
    """TTS_HOST names no address of this machine; the message says why."""


class PortError(Exception):
    """The port cannot be listened on; the message says why and what to do."""


class PortTakenError(PortError):
    """Another program has the port."""


def addresses_of(host: str) -> list[str]:
    """The IP addresses of this machine that TTS_HOST means: one, or several of a name; HostError if there is none."""
    known = _NAMES.get(host.lower())
    if known is None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise HostError(f"{host!r} is no IP address, and as a name it cannot be resolved: {reason}") from None
        known = list(dict.fromkeys(str(address[0]) for *_, address in found))
    ours = [address for address in known if "%" not in address and _is_ours(address)]
    if not ours:
        meaning = "" if host in known else f" ({', '.join(known)})"
        raise HostError(f"{host!r}{meaning} is no address of this machine that can be listened on")
    if host == "*" and "::" in ours and _takes_ipv4():
        return ["::"]
    return ours


def hold_port(addresses: Iterable[str], port: int) -> ExitStack:
    """Take the port at each of `addresses` until the stack is closed; PortError if that is impossible.

    Another call for the port fails, in this process or another, until all processes with these sockets have ended.
    """
    with ExitStack() as held:
        for address in addresses:
            try:
                held.enter_context(_hold(address, port))
            except OSError as error:
                raise _port_error(error, address, port) from None
        return held.pop_all()


def _port_error(error: OSError, address: str, port: int) -> PortError:
    where = f"{address} port {port}"
    setting = variable_of("port")
    if error.errno == errno.EADDRINUSE:
        owner = _owner_of(port) or "another program"
        return PortTakenError(f"{where} is in use by {owner}; stop that program, or choose another port with {setting}")
    if error.errno == errno.EACCES:
        first = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text().strip()
        return PortError(f"{where} may not be listened on by {current_user()}; choose {first} or above with {setting}")
    return PortError(f"{where} cannot be listened on: {error.strerror or error}")


def _hold(address: str, port: int) -> socket.socket:
    """A socket that keeps others from the port, save those that share it (SO_REUSEPORT), as granian's do.

    The socket itself is bound without SO_REUSEPORT, so that it meets no other. SO_REUSEADDR overlooks the
    connections that a former service closed. Two sockets with it may be bound at the same moment,
    but only one of them can listen.
    """
    holder = _socket_for(address)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((address, port))
        holder.listen(1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.shutdown(socket.SHUT_RD)  # listens no more, and stays bound
    except OSError:
        holder.close()
        raise
    return holder


def _is_ours(address: str) -> bool:
    """True if a socket can be bound to the address, at any port."""
    with suppress(OSError), _socket_for(address) as probe:
        probe.bind((address, 0))
        return True
    return False


def _takes_ipv4() -> bool:
    """True if a socket for :: takes IPv4 connections as well, as it does on most machines."""
    with _socket_for("::") as probe:
        return not probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def _socket_for(address: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)


def _owner_of(port: int) -> str | None:
    """The program that listens on the port, for a message; None if none is found within `_OWNER_WAIT_S`."""
    deadline = time.monotonic() + _OWNER_WAIT_S
    while not (listeners := _listeners_on(port)):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(str(file.readlink()) in listeners for file in (process / "fd").iterdir()):
                return _description_of(process)
    uid = next(iter(listeners.values()))
    with suppress(KeyError):
        return f"a process of {pwd.getpwuid(uid).pw_name}"
    return f"a process of uid {uid}"


def _listeners_on(port: int) -> dict[str, int]:
    """The sockets that listen on the port, as links in /proc name them, and the uids that opened them."""
    found = {}
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, uid, _, inode, *_ = line.split()
                if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                    found[f"socket:[{inode}]"] = int(uid)
    return found


def _description_of(process: Path) -> str:
    """Number and command line of a process, or of its parent if the process was forked from that."""
    command = (process / "cmdline").read_bytes()
    with suppress(OSError):
        parent = process.with_name((process / "stat").read_text().rpartition(")")[2].split()[1])
        while (parent / "cmdline").read_bytes() == command:
            process = parent
            parent = process.with_name((process / "stat").read_text().rpartition(")")[2].split()[1])
    return f"process {process.name} ({command.decode(errors='replace').replace(chr(0), ' ').strip()[:100]})"
