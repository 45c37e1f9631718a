"""The reason for a missing GPU worker, and the time of its return: in a file from the supervisor, and in a 503.

The file lies beside the GPU worker's socket. A web worker reads it only while it has no connection,
so what the file says of an older outage is never shown.
"""

import time
from typing import Final

import msgspec

from server.http.errors import ApiError
from shared.sockets import ipc_path

RETRY_AFTER_S: Final = 5.0
"""Seconds until the next try if no supervisor on this machine knows when the GPU worker will be back."""

_LONGEST_RETRY_S: Final = 60.0
"""OpenAI's clients do not obey a longer Retry-After."""


class Outage(msgspec.Struct, frozen=True, kw_only=True):
    """`reason` is a sentence. `back_at`: when the GPU worker is expected to speak again, in Unix seconds."""

    reason: str
    back_at: float

    def retry_after_s(self) -> float:
        """Seconds until then."""
        return self.back_at - time.time()


class OutageFile:
    """The outage file of the GPU worker at `url`."""

    def __init__(self, url: str) -> None:
        path = ipc_path(url)
        self._path = path.with_name(f"{path.name}.outage")

    def write(self, outage: Outage) -> None:
        """Replace the file; a reader sees the old contents or the new ones. Raises OSError."""
        scratch = self._path.with_suffix(".partial")
        scratch.write_bytes(msgspec.json.encode(outage))
        scratch.replace(self._path)

    def read(self) -> Outage | None:
        """The contents; None if there is no supervisor on this machine, or its file cannot be read."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Outage)
        except (OSError, msgspec.DecodeError):
            return None


def unavailable_error(message: str, retry_after_s: float = RETRY_AFTER_S) -> ApiError:
    """The error of a request that finds no GPU worker."""
    return ApiError("worker_unavailable", message, retry_after_s=min(max(1.0, retry_after_s), _LONGEST_RETRY_S))
