"""Messages to systemd (Type=notify, WatchdogSec): the service serves, the service is well, the service stops."""

import os
import socket
from collections.abc import Mapping


class Systemd:
    """The socket of NOTIFY_SOCKET; without one, nothing is sent. A message that cannot be sent stops nothing."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self._is_watched = "WATCHDOG_USEC" in environ
        self._is_ready = False

    def ready(self) -> None:
        """The service serves: once, and then that it is well (WATCHDOG=1) if systemd wants to know."""
        if not self._is_ready:
            self._send("READY=1")
            self._is_ready = True
        elif self._is_watched:
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The service begins to stop."""
        self._send("STOPPING=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        # systemd writes an abstract address with an @ in the place of its null byte.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
                notify.sendto(state.encode(), address)
        except OSError:
            pass
