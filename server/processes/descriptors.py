"""The limit of file descriptors, which the main process raises before it starts the others."""

import resource
from typing import Final

import structlog

from shared.settings import variable_of

RESERVE: Final = 256
"""Descriptors of a web worker besides its connections: sockets to the GPU worker, recordings that are decoded, logs."""

_FEWEST: Final = 16

log = structlog.get_logger(__name__)


def places_for_connections(wanted: int) -> int:
    """Raise this process's limit so that each child can hold `wanted` connections; how many it can.

    Granian spins at the limit, so a web worker takes fewer connections where the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVE
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most == needed:
        return wanted
    places = max(_FEWEST, most - RESERVE)
    log.warning(
        "file_descriptor_limit_too_low",
        hard_limit=hard,
        needed=needed,
        connections=places,
        hint=f"raise the hard limit (ulimit -Hn, LimitNOFILE=) or lower {variable_of('max_connections')}",
    )
    return places
